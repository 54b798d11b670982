"""Loop: one fit, from its options to its checkpoints. It sees inputs and targets, not where they come from."""
