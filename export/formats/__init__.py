"""Graphs of files: how they are read, checked, and computed with rounding. Installed as `shvit.export.formats`."""
