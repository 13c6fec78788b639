"""Pion: a spectrum-preserving optimizer for weight matrices, in torch."""

from .config import PionConfig
from .optimizer import Pion
from .parameters import split_parameters
from .recipes import RECIPES

__all__ = ["RECIPES", "Pion", "PionConfig", "split_parameters"]
