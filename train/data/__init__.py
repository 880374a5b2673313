"""Installed as `shvit.train.data`: image datasets, from files to batches for evaluation."""
