"""Exported files on the processor of phones, under emulation. Installed as `shvit.export.arm64`."""
