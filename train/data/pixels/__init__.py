"""Installed as `shvit.train.data.pixels`: images of any channels and type, from files to a model's size."""
