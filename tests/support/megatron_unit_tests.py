"""pytest plugin for Megatron-LM's own unit tests: on CPU, and with Pion where they say Adam.

``make test-megatron SRC=CHECKOUT`` runs some of them with it, in the checkout's folder.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import types
from typing import Any
from unittest import mock

import pytest

import megatron_patches
from megatron_patches import cpu_device

OTHER_CONFIG = "sets use_distributed_optimizer in one of the two configs alone: Pion refuses it"
SKIPPED = {
    "test_chained_optimizer": "fails with Adam on CPU, where cuda() makes no copy",
    "test_get_megatron_optimizer_with_custom_process_groups": OTHER_CONFIG,
    "test_get_megatron_optimizer_custom_process_groups_validation": OTHER_CONFIG,
}


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    for item in items:
        if reason := SKIPPED.get(item.originalname):
            item.add_marker(pytest.mark.skip(reason=reason))


def choose_pion() -> None:
    """Make every OptimizerConfig of Adam one of Pion."""
    from megatron.core.optimizer.optimizer_config import OptimizerConfig

    original: Any = OptimizerConfig.__init__

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("optimizer", "adam") == "adam":
            kwargs["optimizer"] = "pion"
        original(self, *args, **kwargs)

    OptimizerConfig.__init__ = init  # type: ignore[method-assign]


def let_tests_import() -> None:
    """Give names that tests import and do not use on CPU, once Megatron has found them missing."""
    import megatron.training.training  # noqa: F401

    for name in ("", ".pytorch", ".pytorch.fp8"):
        sys.modules[f"transformer_engine{name}"] = types.ModuleType(f"transformer_engine{name}")
    sys.modules["transformer_engine.pytorch.fp8"].fp8_autocast = contextlib.nullcontext  # type: ignore[attr-defined]
    sys.modules["mock"] = mock


cpu_device.install()
cpu_device.patch_megatron()
megatron_patches.apply()
choose_pion()
let_tests_import()
