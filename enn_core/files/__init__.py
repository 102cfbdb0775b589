"""Files: replaced in one piece, settings, tensors. Knows files only."""
