"""Models: networks as named stages, their keys, and the one forward function of a frozen trunk."""
