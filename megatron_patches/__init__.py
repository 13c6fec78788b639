"""Pion in an unmodified Megatron: ``apply()``, or ``python -m megatron_patches SCRIPT [ARGS…]``."""

from .registration import apply
from .seams import SeamError

__all__ = ["SeamError", "apply"]
