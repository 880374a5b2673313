"""Installed as `shvit.train.step`: what an optimizer step needs, from batches to model, loss and optimizer."""
