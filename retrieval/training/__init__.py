"""Contrastive training of an image tower against a frozen text tower, by backprop or ENN-ℓ."""
