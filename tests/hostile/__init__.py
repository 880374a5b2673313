"""Attacks on every surface, as small tests: bad input is one clear line, and nothing of the user's is lost."""
