"""Files: the one HDF5 format of parts and tables, written whole, checked, read. docs/format.md is normative."""
