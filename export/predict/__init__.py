"""Predictions of a model or an exported file for images, in jobs that resume. Installed as `shvit.export.predict`."""
