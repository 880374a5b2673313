"""What the tests of training share."""

import pytest


@pytest.fixture(autouse=True)
def undrawn_curves(monkeypatch):
    """Curves take a third of a small run's time; those of a module's finished runs, made before this, are drawn."""
    monkeypatch.setattr("shvit.train.loop.plot_curves", lambda log, path: None)
