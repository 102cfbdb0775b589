"""Training image classifiers: data, networks, runs. Needs more than torch; `enn_core` does not."""
