"""torch_dist checkpoints of another optimizer or of other matrices are refused, with the fix."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from megatron_runs import MODEL, NO_DROPOUT, PION, PUBLISHED_FLAGS, SCRIPT, refused, train

pytestmark = pytest.mark.slow

MODELS: dict[str, list[str]] = {
    "default": [],
    "published, few": [
        *(*PUBLISHED_FLAGS, "--num-layers", "1", "--pion-exclude", "linear_(qkv|fc1)"),
    ],
}


@pytest.fixture(scope="module")
def saved(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint of a model's second iteration."""
    folders: dict[str, Path] = {}

    def of(model: str) -> Path:
        if model not in folders:
            folder = folders[model] = tmp_path_factory.mktemp("saved")
            flags = [*PION, *NO_DROPOUT, *MODELS[model], "--ckpt-format", "torch_dist"]
            save = ["--save", str(folder), "--save-interval", "2", "--exit-interval", "2"]
            train(corpus, *flags, *save)
        return folders[model]

    return of


def refused_load(folder: Path, corpus: Path, *flags: str) -> str:
    """The error of a run that must not load a checkpoint."""
    data = ["--data-path", str(corpus), "--data-cache-path", str(corpus.parent / "cache")]
    load = ["--ckpt-format", "torch_dist", "--load", str(folder)]
    output = refused(SCRIPT, *MODEL, *PION, *NO_DROPOUT, *data, *load, *flags)
    return next(line for line in output.splitlines() if "ValueError: " in line)


@pytest.mark.parametrize(
    ("model", "flags", "says"),
    [
        ("default", ["--pion-qkv", "head"], ["--pion-qkv", "'qkv'", "'head'"]),
        (
            "default",
            ["--pion-direction", "momentum"],
            ["--pion-direction", "momentum is 'polar', this run's 'lie'"],
        ),
        ("default", ["--pion-exclude", "linear_proj"], ["--pion-exclude", "linear_proj.weight"]),
        (
            "published, few",
            ["--pion-momentum", "transported"],
            ["--pion-momentum", "'transported'", "'lie'"],
        ),
        ("published, few", ["--pion-direction", "momentum"], ["--pion-direction", "True", "False"]),
        ("published, few", ["--pion-side", "in"], ["--pion-side", "['in', 'out']", "['in']"]),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_state_of_other_matrices_is_refused(
    saved: Callable[[str], Path], corpus: Path, model: str, flags: list[str], says: list[str]
) -> None:
    error = refused_load(saved(model), corpus, *MODELS[model], *flags)
    assert all(word in error for word in [*says, "--no-load-optim", "--finetune"]), error


def test_state_of_another_optimizer_is_refused_and_its_weights_load(
    corpus: Path, tmp_path: Path
) -> None:
    common = [*NO_DROPOUT, "--ckpt-format", "torch_dist"]
    save = ["--save", str(tmp_path), "--save-interval", "10", "--exit-interval", "10"]
    adam = train(corpus, *common, "--optimizer", "adam", *save)
    assert "no state of --optimizer pion" in refused_load(tmp_path, corpus)
    for flag, first in (("--no-load-optim", 11), ("--finetune", 1)):
        load = ["--load", str(tmp_path), flag, "--exit-interval", str(first)]
        (step, *_) = train(corpus, *common, *PION, *load)
        assert step.iteration == first
        # Adam's weights after ten steps, not initial ones, whose loss is log(256) = 5.5.
        assert float(step.loss) < float(adam[4].loss), flag
