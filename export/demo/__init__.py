"""The whole path on real images: train, export, verify, evaluate, measure, report. Installed as `shvit.export.demo`."""
