"""Pion: a spectrum-preserving optimizer for weight matrices, in torch."""

from .config import PionConfig
from .optimizer import Pion

__all__ = ["Pion", "PionConfig"]
