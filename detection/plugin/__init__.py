"""What MMDetection's registries get: backbones, the neck, transforms, operators. Installed as `shvit.detection.plugin`."""
