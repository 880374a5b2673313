"""What differs by runtime: each choice that a measurement made, in one place.

Deployment (shvit/deployment.py) is the same for all: no form of it was faster in one runtime and slower in another.
Files are written for one image unless more are asked for, and bench/worker.py compiles for the batch that it is to
run: an open one costs OpenVINO up to 16 %. docs/explanation/measurements.md has the figures.
"""

from dataclasses import dataclass, field

HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""On Linux the C library then asks for pages of 2 MB: with one image at a time the weights come from memory, and a
processor fetches ahead within a page only."""


@dataclass(frozen=True)
class Tuning:
    """How one runtime's files are written and run."""

    float_stem: bool = False
    """Leave an int8 model's first convolution, which has three channels, in float32."""
    environment: dict[str, str] = field(default_factory=dict)
    """Of the process that runs it; set before it starts."""


TUNING = {
    "onnxruntime": Tuning(float_stem=True, environment=HUGE_PAGES),
    "openvino": Tuning(environment=HUGE_PAGES),
}
