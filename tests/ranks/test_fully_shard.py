"""Under FSDP2, replicas and DTensor's tensor parallelism weights are those of one process.

And a checkpoint of any of them goes on in any other: see fully_shard_checks.py.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from megatron_runs import LIMIT_S, ROOT, environment

pytestmark = pytest.mark.slow

SCRIPT = ROOT / "tests" / "support" / "fully_shard_checks.py"
OF_A_MESH = (
    *("polar", "published", "msign", "one object", "replaced"),
    *("collectives", "changed weights"),
)
OF_DATA = ("checkpoints", "whole state", "flat state", "mixed precision")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


def passed(folder: Path, ranks: int, word: str = "") -> set[str]:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(ranks), str(folder), word],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stderr[-8000:]
    lines = (line.partition("passed: ") for line in done.stdout.splitlines())
    return {name for _, mark, name in lines if mark}


def test_one_rank(folder: Path) -> None:
    assert passed(folder, 1) == {"checkpoints"}


@pytest.mark.parametrize(
    ("ranks", "meshes"), [(2, ("fsdp", "tp")), (4, ("fsdp", "hsdp", "fsdp and tp"))]
)
def test_ranks(folder: Path, ranks: int, meshes: tuple[str, ...]) -> None:
    expected = {f"{mesh}, {check}" for mesh in meshes for check in OF_A_MESH}
    expected |= {f"{mesh}, {check}" for mesh in meshes if mesh != "tp" for check in OF_DATA}
    assert passed(folder, ranks) == expected | {"refusals"}


@pytest.mark.parametrize("ranks", [2, 1])
def test_fewer_ranks_go_on_from_what_more_have_saved(folder: Path, ranks: int) -> None:
    assert len(list(folder.glob("polar, *"))) == 5
    expected = "fsdp, checkpoints" if ranks > 1 else "checkpoints"
    assert passed(folder, ranks, "checkpoints") == {expected}
