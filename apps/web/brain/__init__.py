"""The brain page."""
