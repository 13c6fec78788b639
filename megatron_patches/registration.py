"""Puts Pion into an unmodified Megatron: ``apply()`` patches every seam of ``seams``."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

from . import seams
from .arguments import extend_config
from .parser import add_pion_arguments

_applied = False


def apply() -> None:
    """Register ``--optimizer pion`` and its flags in the installed Megatron; once is enough.

    Call it before anything imports ``get_megatron_optimizer`` by name and before arguments are
    parsed.

    Raises:
        SeamError: this Megatron is missing, or lacks a place that Pion holds on to.
    """
    global _applied
    if _applied:
        return
    seams.check()
    # What follows imports Megatron: not before its seams are found.
    from . import checkpoint_checks, diagnostics, distributed_optimizer, sharded_state
    from .learning_rates import with_lr_mult, with_mup
    from .megatron_optimizer import with_pion

    config_module: Any = importlib.import_module("megatron.core.optimizer.optimizer_config")
    extend_config(config_module.OptimizerConfig)
    _register()
    sharded_state.apply()
    checkpoint_checks.apply()
    distributed_optimizer.apply()
    _use_compiled_helpers()
    core: Any = importlib.import_module("megatron.core.optimizer")
    core.get_megatron_optimizer = with_pion(core.get_megatron_optimizer)
    core._get_param_groups = with_lr_mult(core._get_param_groups)
    core.get_mup_config_overrides = with_mup(core.get_mup_config_overrides)
    if seams.has_training():
        diagnostics.apply()
        training: Any = importlib.import_module("megatron.training.training")
        training.get_megatron_optimizer = core.get_megatron_optimizer
        training.get_mup_config_overrides = core.get_mup_config_overrides
        arguments: Any = importlib.import_module("megatron.training.arguments")
        arguments.add_megatron_arguments = _with_flags(arguments.add_megatron_arguments)
    _applied = True


def _with_flags(original: Any) -> Any:
    @functools.wraps(original)
    def add_megatron_arguments(parser: Any) -> Any:
        return add_pion_arguments(original(parser))

    return add_megatron_arguments


def _register() -> None:
    from megatron.core.optimizer.emerging_optimizers import (
        _EMERGING_OPTIMIZERS,
        EmergingOptimizerEntry,
    )

    from .megatron_optimizer import pion_kwargs
    from .parameters import NOT_PION
    from .sharded_state import CheckpointedPion

    _EMERGING_OPTIMIZERS["pion"] = EmergingOptimizerEntry(
        optimizer_cls=CheckpointedPion,
        init_state_fn=lambda optimizer, config=None: None,  # Pion makes its state when it is made
        config_to_kwargs=pion_kwargs,
        default_param_overrides={NOT_PION: {"optimizer": "adam"}},
    )


def _use_compiled_helpers() -> None:
    """Spare the wheel's Megatron its make: it ships the compiled dataset helpers and no Makefile.

    pretrain() calls make whatever is there (initialize_megatron), and ends when it fails.
    """
    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None:
        utils: Any = importlib.import_module("megatron.core.datasets.utils")
        utils.compile_helpers = lambda: None
