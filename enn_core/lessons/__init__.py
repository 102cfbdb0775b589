"""Lessons: what users taught, kept on disk, and the maps that absorb it; for any app.

Knows nothing of images, text or brains. Its public names are those of `enn_core.feedback`.
"""
