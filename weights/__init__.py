"""Published checkpoints, and how to download, check and convert them. Installed as `shvit.weights`."""
