"""Installed as `shvit.train.run`: what a run writes, its folder, metrics, log lines and curves."""
