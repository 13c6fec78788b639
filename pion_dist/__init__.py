"""Pion: a spectrum-preserving optimizer for weight matrices, in torch."""

from .config import PionConfig
from .optimizer import Pion
from .recipes import RECIPES

__all__ = ["RECIPES", "Pion", "PionConfig"]
