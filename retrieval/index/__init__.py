"""The eigen-index on disk."""
