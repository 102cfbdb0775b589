"""The `enn` command line and the web pages."""
