"""Installed as shvit.weights: which checkpoints exist, where they come from, how to get, check and convert them."""
