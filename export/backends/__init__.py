"""One file a runtime: how its files are written, opened, run and profiled. Installed as `shvit.export.backends`."""
