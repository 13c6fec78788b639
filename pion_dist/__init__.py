"""Pion: a spectrum-preserving optimizer for weight matrices, in torch."""

from typing import TYPE_CHECKING, Any

from .config import PionConfig
from .recipes import RECIPES

if TYPE_CHECKING:
    from .optimizer import Pion

__all__ = ["RECIPES", "Pion", "PionConfig"]


def __getattr__(name: str) -> Any:
    # Not imported above: the doctor has to start where torch does not.
    if name == "Pion":
        from .optimizer import Pion

        return Pion
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
