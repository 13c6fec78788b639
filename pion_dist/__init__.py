"""Pion: a spectrum-preserving optimizer for weight matrices, in torch."""

import importlib
from typing import TYPE_CHECKING, Any

from .config import PionConfig
from .recipes import RECIPES

if TYPE_CHECKING:
    from .combined import PionWithAdamW
    from .optimizer import Pion
    from .parameters import split_parameters

__all__ = [
    "RECIPES",
    "Pion",
    "PionConfig",
    "PionWithAdamW",
    "__version__",
    "split_parameters",
]

__version__ = "0.1.0"

# Not imported above: the doctor has to start where torch does not.
_WITH_TORCH = {
    "Pion": ".optimizer",
    "PionWithAdamW": ".combined",
    "split_parameters": ".parameters",
}


def __getattr__(name: str) -> Any:
    if name not in _WITH_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_WITH_TORCH[name], __name__), name)
