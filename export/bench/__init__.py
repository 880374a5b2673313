"""Latency of models and runtimes, measured, recorded and drawn. Installed as `shvit.export.bench`."""
