"""Pion in an unmodified Megatron: ``apply()``, or ``python -m megatron_patches SCRIPT [ARGS…]``."""

from .arguments import recipe
from .registration import apply
from .seams import SeamError

__all__ = ["SeamError", "apply", "recipe"]
