"""Cost and design of models, and a check of the machine. Installed as `shvit.export.analysis`."""
