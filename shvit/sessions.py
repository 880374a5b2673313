"""ONNX Runtime sessions, set up in one place.

It imports nothing of this project, so that the process that measures latency can load this file alone.
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}


def create_session(
    source: Path | str | bytes,
    threads: int | None = None,
    *,
    provider: str = "cpu",
    exact: bool = False,
    profile: Path | None = None,
) -> "InferenceSession":
    """Return an ONNX Runtime session. It prints nothing: what goes wrong is raised.

    Args:
        source: a file, or its content.
        threads: threads of one operator; ONNX Runtime's choice (all cores) where None.
        provider: one of `PROVIDERS`.
        exact: have 8-bit sums right on every processor. By default x86 without VNNI adds up pairs of products in 16
            bits, which overflow.
        profile: how the name of a file begins into which each operator's time is written.

    Raises:
        RuntimeError: this build of ONNX Runtime does not have the provider. Other exceptions are ONNX Runtime's own,
            whose types are not public.
    """
    import onnxruntime

    if provider != "cpu":
        onnxruntime.preload_dlls()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if exact:
        options.add_session_config_entry("session.x64quantprecision", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    content = source if isinstance(source, bytes) else str(source)
    session = onnxruntime.InferenceSession(content, options, providers=[PROVIDERS[provider]])
    if PROVIDERS[provider] not in session.get_providers():
        raise RuntimeError(f"ONNX Runtime here has no {PROVIDERS[provider]}; install onnxruntime-gpu")
    return session
