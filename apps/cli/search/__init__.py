"""`enn search`."""
