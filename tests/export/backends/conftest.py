"""What tests of the backends share: a tiny SHViT with its spec, and a small trained one with its images."""

from dataclasses import replace

import pytest
from torch import nn

from shvit.export.spec import Spec
from tests.conftest import create_tiny
from tests.export.judged import Workshop

PX = 64


def spec_of(model: nn.Module, **changes) -> Spec:
    return replace(Spec.of("shvit_s1", model, PX), **changes)


@pytest.fixture(scope="module")
def tiny():
    return create_tiny(depth=(1, 1, 1))


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("workshop"), images=16)
