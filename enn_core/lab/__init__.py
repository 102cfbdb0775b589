"""Image classifiers, the bench of rules, continual learning: above the rest of the core."""
