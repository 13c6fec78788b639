"""Learning rates of Pion's own: by --pion-lr-mult, and under muP."""

from __future__ import annotations

import functools
from typing import Any

from megatron.core.optimizer.optimizer_config import (
    ParamKey,
    ParamPredicate,
    ParamWithNamePredicate,
)

from .distributed_optimizer import WITH_PION
from .parameters import is_scalar


def with_lr_mult(original: Any) -> Any:
    """_get_param_groups with --pion-lr-mult, on top of what overrides say of a group."""

    @functools.wraps(original)
    def get_param_groups(model_chunks: Any, config: Any, config_overrides: Any) -> Any:
        groups = original(model_chunks, config, config_overrides)
        with_pion = config.optimizer == "pion" or getattr(config, WITH_PION, False)
        if not with_pion or config.pion_lr_mult == 1.0:
            return groups
        pions = [group for group in groups if group.get("optimizer", "pion") == "pion"]
        others = [group for group in groups if group.get("optimizer", "pion") != "pion"]
        for group in pions:
            # Megatron logs the first default group's rate: Adam's, where Adam has such a group.
            group["default_config"] &= not any(other["default_config"] for other in others)
            for key in ("max_lr", "min_lr"):
                if group[key] is not None:
                    group[key] *= config.pion_lr_mult
        return groups

    return get_param_groups


def with_mup(original: Any) -> Any:
    """get_mup_config_overrides: Adam's under ``--optimizer adam``, for what is not Pion's.

    Pion's steps have one root mean square at every width, and so a spectral norm that grows with
    the root of the width, which muP wants to be the same (https://arxiv.org/abs/2310.17813).
    """

    def of_adam(key: ParamKey) -> ParamKey:
        # Evaluated in get_megatron_optimizer, when it is decided.
        predicate = ParamWithNamePredicate(
            name=f"{key.with_name_predicate.name}_not_pion",  # its hash
            fn=lambda p, name: is_scalar(p) and key.matches(p, name),
        )
        return ParamKey(with_name_predicate=predicate)

    @functools.wraps(original)
    def get_mup_config_overrides(
        config: Any, mup_width_mult: float, optimizer_type: str = "adam"
    ) -> Any:
        if optimizer_type != "pion":
            return original(config, mup_width_mult, optimizer_type)
        overrides = original(config, mup_width_mult, "adam")
        with_pion = {of_adam(key): override for key, override in overrides.items()}
        if mup_width_mult != 1.0:
            factor = mup_width_mult**-0.5
            rates = {
                key: factor * rate
                for key, rate in (("max_lr", config.lr), ("min_lr", config.min_lr))
                if rate is not None
            }
            pions = ParamPredicate(name="pion_mup", fn=lambda p: not is_scalar(p))
            with_pion[ParamKey(predicate=pions)] = rates
        return with_pion

    return get_mup_config_overrides
