"""Attacks on every surface: third-party files, names, configs and servers, each of which ends in one line."""
