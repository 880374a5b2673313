"""One backend a runtime: how its files are written, loaded and run. Installed as `shvit.export.backends`."""
