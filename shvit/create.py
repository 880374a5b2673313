"""Names of models: which are taken, and what is said of others."""

import difflib

from .errors import InputError

__all__ = ["check_model_name"]

WEIGHTS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar", ".onnx")
MAX_SHOWN = 80  # characters of a name that is refused


def check_model_name(name: str, what: str = "model") -> None:
    """Raise InputError unless timm can build a model of this name without reading a file or a network.

    Args:
        name: an architecture that timm knows, ours included, with or without the tag of published weights
            (`resnet18.a1_in1k`). Names of the Hugging Face hub (`hf-hub:ORG/NAME`) and of folders (`local-dir:…`) are
            refused: they name weights, which are given as a checkpoint.
        what: what it is the name of, for messages.
    """
    import timm

    from . import shvit  # noqa: F401  (registers the models)

    shown = repr(name if len(name) <= MAX_SHOWN else name[:MAX_SHOWN] + "…")
    architecture, dot, tag = name.partition(".")
    known = timm.is_model(name)
    if known and (not dot or tag in (tags := _tags(architecture))):
        return
    if name.lower().endswith(WEIGHTS):
        raise InputError(f"{shown} is a file of weights and no model's name; such a file is given as --checkpoint")
    if known:
        choice = f"choose from {', '.join(f'{architecture}.{each}' for each in tags)}, or" if tags else "give"
        raise InputError(f"unknown {what} {shown}: {architecture} has no weights of that tag; {choice} {architecture} "
                         "alone")  # fmt: skip
    if ":" in name:
        raise InputError(f"unknown {what} {shown}: names with a source are not taken; name the architecture, and give "
                         "its weights as --checkpoint FILE")  # fmt: skip
    raise InputError(f"unknown {what} {shown}; {_suggest(name, timm.list_models())}")


def _tags(architecture: str) -> list[str]:
    """The tags of an architecture's published weights."""
    import timm

    names = timm.list_models(f"{architecture}.*", include_tags=True)
    return [name.partition(".")[2] for name in names if "." in name]


def _suggest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name[:MAX_SHOWN], known, n=4)
    ours = [model for model in known if model.startswith("shvit")]
    return f"choose from {', '.join(sorted(close) or ours)} (`shvit list '*'` shows all)"
