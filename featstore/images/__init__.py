"""Images: which ones there are, their bytes and contents, and how each becomes a view."""
