"""MMDetection's configs, read as data, with every value compared with a list of what is allowed.

Installed as `shvit.detection.parsing`; it imports nothing else of this package.
"""
