"""COCO annotation files: read, checked and repaired before a detector sees them.

Installed as `shvit.detection.coco`; of this package it imports `shvit.detection.parsing` alone.
"""
