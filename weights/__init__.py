"""Which checkpoints exist, where they come from, how to get, check and convert them. Installed as `shvit.weights`."""
