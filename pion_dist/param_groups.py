"""What a parameter group of torch may say to Pion."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import torch

from .config import PionConfig

_OPTIONS = {field.name for field in dataclasses.fields(PionConfig)}
_OPTIONS_OF_OTHERS = {
    name
    for each in vars(torch.optim).values()
    if inspect.isclass(each) and issubclass(each, torch.optim.Optimizer)
    for name in inspect.signature(each).parameters
} - {"params", "lr", "defaults"}


def refuse_options(group: Mapping[str, Any], place: str) -> None:
    """Refuse a group with options of Pion's, or of torch's other optimizers unless they are off.

    Args:
        group: as it was given.
        place: of the group, for the message.

    Raises:
        ValueError: names the option and what to do.
    """
    for name, value in group.items():
        if name in _OPTIONS:
            raise ValueError(
                f"{name}={value!r} {place}: Pion's options are the same in all groups; give "
                f"config=PionConfig({name}=...)"
            )
        if name == "weight_decay" and value:
            raise ValueError(
                f"weight_decay={value!r} {place}: decay would change the spectrum, so that Pion "
                "has none; set it to 0, or give the parameters to torch.optim.AdamW"
            )
        if name in _OPTIONS_OF_OTHERS and value:
            raise ValueError(f"{name}={value!r} {place}: Pion has no such option; leave it out")
