"""`enn train`, `enn convert` and `enn fuse`."""
