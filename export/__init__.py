"""A trained model into a verified artefact, and its latency. Installed as `shvit.export`."""
