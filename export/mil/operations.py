"""All operations of Core ML that are computed here, by MIL's name; `registry` says what their arguments are."""

from . import elementwise, layers, resizing, tensors
from .registry import Operations

OPERATIONS = Operations({**elementwise.OPERATIONS, **layers.OPERATIONS, **tensors.OPERATIONS, **resizing.OPERATIONS})
