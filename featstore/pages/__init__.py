"""Pages that a browser shows: images, maps of features, tables and figures, as one file or served on this machine."""
