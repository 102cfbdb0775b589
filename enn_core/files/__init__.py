"""Files: replaced in one piece, settings. Knows files only."""
