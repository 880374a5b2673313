"""MMDetection's configs, read as data and held against a list. Installed as `shvit.detection.parsing`."""
