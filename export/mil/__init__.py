"""Runs a Core ML program on any machine. Installed as `shvit.export.mil`."""
