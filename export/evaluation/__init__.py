"""Evaluation of checkpoints and exported files: what is printed, drawn and returned for each task. Installed as `shvit.export.evaluation`."""
