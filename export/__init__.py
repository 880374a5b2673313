"""A trained model into a verified artifact, and its latency. Installed as `shvit.export`."""
