"""Installed as `shvit.train.labels`: labels from a table, in place of class folders."""
