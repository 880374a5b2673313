"""Optional packages: which extra installs one, and the message where it is missing."""

from collections.abc import Sequence

__all__ = ["EXTRAS", "advise", "extra_of"]

EXPORT = ("export", "phone", "detection", "demo")
EXTRAS = {  # top-level module: the extras that bring it, the first one unless a command has another
    "onnx": EXPORT,
    "onnxruntime": EXPORT,
    "onnxscript": EXPORT,
    "skimage": EXPORT,
    "scipy": EXPORT,
    "tornado": ("phone",),
    "segno": ("phone",),
    "cryptography": ("phone",),
    "coremltools": ("coreml", "demo"),
    "openvino": ("openvino",),
    "elpv_dataset": ("demo",),
    "matplotlib": ("train", *EXPORT),
    "tensorboard": ("train", "detection", "demo"),
    "torchvision": ("train", "detection", "demo"),
    "datasets": ("data",),
    "pillow_heif": ("heic",),
    "mmengine": ("detection",),
    "mmcv": ("detection",),
    "mmdet": ("detection",),
}
COMMANDS = {  # words that a command begins with, longest first: the extra with which all of it runs
    "bench phone": "phone",
    "bench import": "phone",
    "site": "phone",
    "bench": "export",
    "info": "export",
    "eval": "export",
    "export": "export",
    "verify": "export",
    "detect": "detection",
    "train": "train",
    "demo": "demo",
}
DISTRIBUTIONS = {"yaml": "pyyaml", "PIL": "pillow", "cv2": "opencv-python-headless"}


def extra_of(module: str, words: Sequence[str] = ()) -> str | None:
    """Return the extra that installs a top-level module, the command's own if that does; None where none does.

    Args:
        words: the command line after `shvit`.
    """
    brought_by = EXTRAS.get(module, ())
    line = " ".join([*words, ""])
    own = next((extra for command, extra in COMMANDS.items() if line.startswith(f"{command} ")), None)
    return own if own in brought_by else next(iter(brought_by), None)


def advise(module: str, words: Sequence[str] = ()) -> str:
    """Return one line that says that a module is missing and how it is installed.

    Args:
        module: its name, as in an import.
        words: as in `extra_of`.
    """
    package = module.partition(".")[0]
    if extra := extra_of(package, words):
        return f"this needs the package {package}; install it with: pip install 'shvit[{extra}]'"
    distribution = DISTRIBUTIONS.get(package, package.replace("_", "-"))
    return f"this needs the package {package}, which is not installed; install it with: pip install {distribution}"
