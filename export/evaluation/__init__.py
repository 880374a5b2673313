"""Evaluation of checkpoints and exported files, for each task. Installed as `shvit.export.evaluation`."""
