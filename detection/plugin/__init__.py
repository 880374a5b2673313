"""Parts that are registered with MMDetection: backbones, the neck, transforms and operators.

Installed as `shvit.detection.plugin`; of this package it imports `shvit.detection.coco` alone.
"""
