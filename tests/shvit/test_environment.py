import platform
from importlib import metadata

from shvit.environment import versions


def test_versions_are_those_of_installed_packages():
    found = versions("torch", "no-such-package-of-ours", "timm")
    assert found == {
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
        "timm": metadata.version("timm"),
    }
