"""Recall@K between images and captions, and what becomes of the numbers."""
