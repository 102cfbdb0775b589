"""Models: towers, their weights files, and how they run."""
