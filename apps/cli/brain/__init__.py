"""`enn brain`."""
