"""From a file to a brain on the grid that the networks see."""
