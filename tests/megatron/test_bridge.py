"""Pion trains where a library gives Megatron configs and no arguments, as Megatron-Bridge does."""

import importlib.util
import subprocess
import sys

import pytest
from megatron_runs import ROOT, environment

pytestmark = pytest.mark.slow


def library(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "support" / "library_run.py"), *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_a_config_is_enough() -> None:
    assert "a config of Megatron's: passed" in library()


@pytest.mark.skipif(
    importlib.util.find_spec("megatron.bridge") is None,
    reason="no Megatron-Bridge: docs/integrations.md says how to install it",
)
def test_a_config_of_megatron_bridge() -> None:
    assert "a config of Megatron-Bridge's: passed" in library("bridge")
