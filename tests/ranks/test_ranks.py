"""On 2 and 4 ranks every mode of tensor parallelism is the float64 reference (rank_checks.py)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
from megatron_runs import ROOT, environment
from rank_checks import FEW, checks

from pion_dist import PionConfig
from pion_dist.config import choices

pytestmark = pytest.mark.slow

SCRIPT = ROOT / "tests" / "support" / "rank_checks.py"
SECONDS = 1800  # 300 to 400 checks; 100 to 200 s on idle cores


class Launches:
    """What the checks of a launch said, each launch once."""

    def __init__(self) -> None:
        self.failures: dict[int, dict[str, dict[str, str]]] = {}
        self.ended: dict[int, str] = {}

    def of(self, ranks: int, name: str) -> str:
        """The ranks' tracebacks; empty where the check passed."""
        if ranks not in self.failures:
            self.launch(ranks)
        if name not in self.failures[ranks]:
            return f"did not run: {self.ended[ranks]}"
        said = self.failures[ranks][name]
        return "\n".join(f"rank {rank}: {text}" for rank, text in said.items())

    def launch(self, ranks: int) -> None:
        # A session of its own, so that nothing outlives the test whatever becomes of the launcher.
        with subprocess.Popen(
            [sys.executable, str(SCRIPT), str(ranks)],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                out, err = process.communicate(timeout=SECONDS)
                how = f"the launch ended with {process.returncode}"
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                out, err = process.communicate()
                how = f"the launch took more than {SECONDS} s"
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                raise
        lines = [json.loads(line) for line in out.splitlines() if line.startswith('{"name"')]
        self.failures[ranks] = {line["name"]: line["failures"] for line in lines}
        self.ended[ranks] = f"{how}\n{err[-4000:]}"


@pytest.fixture(scope="module")
def launches() -> Launches:
    return Launches()


def test_every_direction_and_momentum_is_exchanged() -> None:
    tried = [PionConfig(**options) for options in FEW]
    assert {config.direction for config in tried} == set(choices()["direction"])
    assert {config.momentum for config in tried} == set(choices()["momentum"])


@pytest.mark.parametrize(
    ("ranks", "name"), [(ranks, name) for ranks in (2, 4) for name in checks(ranks)]
)
def test_on_ranks(launches: Launches, ranks: int, name: str) -> None:
    said = launches.of(ranks, name)
    assert not said, said
