"""Training and evaluation. Installed as `shvit.train`."""
