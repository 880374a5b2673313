"""A trained model into a verified artifact, and its latency. Installed as `shvit.export`.

```python
from shvit.export import Predictor, benchmark, export_model, load_artifact, verify_artifact

certificate = export_model("onnx", "shvit_s1", "s1.onnx", checkpoint="best.safetensors")
probabilities = load_artifact("s1.onnx")(image).softmax(dim=1)
labels = Predictor(artifact="s1.onnx", top=1)({"path": ["a.jpg", "b.jpg"]})["labels"]
```
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backends.registry import load_artifact
    from .bench.measure import benchmark
    from .pipeline import export_model, verify_artifact
    from .predict.predictor import Predictor

__all__ = ["Predictor", "benchmark", "export_model", "load_artifact", "verify_artifact"]

MODULES = {
    "Predictor": ".predict.predictor",
    "benchmark": ".bench.measure",
    "export_model": ".pipeline",
    "load_artifact": ".backends.registry",
    "verify_artifact": ".pipeline",
}
"""Where the public functions are; they are imported when they are first used, so that `--help` stays fast."""


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(MODULES[name], __name__), name)
