"""The whole pipeline on real images, and its report. Installed as `shvit.export.demo`."""
