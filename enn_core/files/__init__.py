"""Files: replaced in one piece, settings, tensors, what comes with the code. Knows files only."""
