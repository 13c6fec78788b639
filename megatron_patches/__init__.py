"""Pion in an unmodified Megatron: ``apply()``, or ``python -m megatron_patches SCRIPT [ARGS…]``."""

from .arguments import recipe
from .launch import LaunchError, set_ranks
from .registration import apply
from .seams import SeamError

__all__ = ["LaunchError", "SeamError", "apply", "recipe", "set_ranks"]
