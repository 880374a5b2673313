"""int8: ranges of activations, quantized files, which layers to exclude. Installed as `shvit.export.quantization`."""
