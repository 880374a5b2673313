"""What a model costs, and the designs that it is compared with. Installed as `shvit.export.analysis`."""
