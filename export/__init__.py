"""A trained model into a verified artifact, and its latency. Installed as `shvit.export`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backends.registry import load_artifact
    from .bench.measure import benchmark
    from .pipeline import export_model, verify_artifact

__all__ = ["benchmark", "export_model", "load_artifact", "verify_artifact"]


def __getattr__(name: str) -> Any:
    """Import a public function when it is first asked for: the modules of this package must not wait for all others."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import pipeline
    from .backends import registry
    from .bench import measure

    return next(getattr(module, name) for module in (registry, measure, pipeline) if name in vars(module))
