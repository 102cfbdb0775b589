"""The `enn` command line."""
