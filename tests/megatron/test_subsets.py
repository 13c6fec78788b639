"""Checkpoints move between layouts also where layers, experts or stages differ in their state.

Some of a model is excluded from Pion, some frozen, or nothing is Pion's at all. What a checkpoint
of one layout goes on to in another equals the straight run.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from layout_table import MODELS
from megatron_runs import COMMON, NO_DROPOUT, PION, ROOT, launch

sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "tools")]

from checkpoint_weights import Checkpoint  # noqa: E402

slow = pytest.mark.slow

ITERATIONS, SAVED = 6, 3
TP2 = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
PP2 = ["--pipeline-model-parallel-size", "2"]
EP2 = ["--expert-model-parallel-size", "2", "--expert-tensor-parallel-size", "1"]
DIST_OPT = ["--use-distributed-optimizer"]
OVERLAP = ["--overlap-grad-reduce", "--overlap-param-gather"]


@dataclass(frozen=True)
class Case:
    """A subset, the layout whose run is saved, and those that go on from its checkpoint.

    Attributes:
        saved: flags of the layout.
        loaded: others', by name.
        model: one of MODELS.
        exclude: of --pion-exclude, if any.
        frozen: an expression for names of parameters that are not trained, if any.
        flags: of all the runs.
    """

    saved: list[str]
    loaded: dict[str, list[str]]
    model: str = "llama"
    exclude: str = ""
    frozen: str = ""
    flags: list[str] = field(default_factory=list)

    @property
    def common(self) -> list[str]:
        return [*self.flags, *(["--pion-exclude", self.exclude] if self.exclude else [])]


CASES = {
    # A layer that is Adam's, a frozen one, a frozen attention, and an expert of a layer's.
    "mixed": Case(
        [*TP2, *EP2],
        {"pp2": PP2, "dist-opt": [*EP2, *DIST_OPT]},
        model="moe",
        exclude=r"layers\.0\.|layers\.2\.mlp\.experts\.local_experts\.1\.",
        frozen=r"layers\.1\.|layers\.3\.self_attention",
    ),
    "bf16": Case(
        DIST_OPT,
        {"pp2": PP2, "dist-opt": [*DIST_OPT, *OVERLAP]},
        exclude=r"layers\.0\.",
        frozen=r"layers\.1\.|layers\.3\.mlp",
        flags=["--bf16"],
    ),
    "no matrix": Case(TP2, {"pp2": PP2, "dist-opt": DIST_OPT}, exclude="."),
    "embedding": Case(DIST_OPT, {"tp2": TP2}, frozen="layers|norm|output"),
    "experts": Case(DIST_OPT, {"ep2": EP2}, model="moe", frozen=r"^(?!.*local_experts)"),
    "second stage": Case(
        PP2, {"dist-opt": [*PP2, *DIST_OPT, *OVERLAP]}, frozen=r"embedding|layers\.[01]\."
    ),
}
MOVES = [(case, loaded) for case in CASES for loaded in CASES[case].loaded]


class Runs:
    """Every case's runs, on two ranks, in one launch."""

    def __init__(self, corpus: Path, folder: Path) -> None:
        self.folder = folder
        self.data = ["--data-path", str(corpus), "--data-cache-path", str(corpus.parent / "cache")]
        jobs = []
        for name, case in CASES.items():
            jobs.append(self.job(name, "saved", case, case.saved))
            load = ["--load", str(self.checkpoint(name, "saved")), "--ckpt-step", str(SAVED)]
            for loaded, layout in case.loaded.items():
                jobs.append(self.job(name, loaded, case, [*layout, *load]))
        file = folder / "jobs.json"
        file.write_text(json.dumps(jobs))
        launch(ROOT / "tests" / "support" / "many_runs.py", str(file), processes=2)

    def checkpoint(self, name: str, run: str) -> Path:
        return self.folder / f"{name}-{run}"

    def job(self, name: str, run: str, case: Case, flags: list[str]) -> dict[str, Any]:
        folder = self.checkpoint(name, run)
        common = [*COMMON, *MODELS[case.model], *self.data, *NO_DROPOUT, *PION, *case.common]
        common += ["--ckpt-format", "torch_dist"]
        common += ["--train-iters", str(ITERATIONS), "--save-interval", str(SAVED)]
        given = {"frozen": case.frozen} if case.frozen else {}
        return {
            "name": f"{name}, {run}",
            "flags": [*common, "--save", str(folder), *flags],
            "steps": str(folder.with_suffix(".json")),
            **given,
        }

    def steps(self, name: str, run: str) -> list[dict[str, Any]]:
        steps: list[dict[str, Any]] = json.loads(
            self.checkpoint(name, run).with_suffix(".json").read_text()
        )
        return steps

    def iteration(self, name: str, run: str, number: int) -> Path:
        return self.checkpoint(name, run) / f"iter_{number:07d}"

    def sizes(self, name: str, run: str) -> dict[str, torch.Size]:
        """Sizes of the optimizer's tensors in the last checkpoint, by key."""
        reader = dcp.FileSystemReader(self.iteration(name, run, ITERATIONS))
        entries = reader.read_metadata().state_dict_metadata.items()
        return {k: e.size for k, e in entries if k.startswith("optimizer.") and hasattr(e, "size")}


@pytest.fixture(scope="module")
def runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(corpus, tmp_path_factory.mktemp("subsets"))


@slow
@pytest.mark.parametrize(("case", "loaded"), MOVES)
def test_checkpoints_of_subsets_move(runs: Runs, case: str, loaded: str) -> None:
    straight, moved = runs.steps(case, "saved")[SAVED:], runs.steps(case, loaded)
    assert [step["iteration"] for step in moved] == [step["iteration"] for step in straight]
    # As EXACT and BF16_ROUNDED in test_layouts.py: sums in another order, and with bf16 masters
    # whose copies round elsewhere.
    loss, norm = (2**-8, 2**-5) if case == "bf16" else (2e-6, 4e-6)
    for step, expected in zip(moved, straight, strict=True):
        assert step["losses"] == pytest.approx(expected["losses"], rel=loss)
        assert step["grad_norm"] == pytest.approx(expected["grad_norm"], rel=norm)
    assert runs.sizes(case, loaded) == runs.sizes(case, "saved"), "keys depend on the layout"


@slow
def test_only_incomplete_stacks_are_taken_apart(runs: Runs) -> None:
    sizes = runs.sizes("mixed", "saved")
    state = "optimizer.state."
    fc2 = "decoder.layers.{}.mlp.experts.experts.{}.linear_fc2.weight"
    pion, adam = "m.whole", "exp_avg"
    for layer in range(4):
        for expert in range(4):
            its_adam = layer == 0 or (layer, expert) == (2, 1)
            its_pion = layer > 1 and not its_adam
            key = fc2.format(layer, expert)
            assert (f"{state}{adam}.{key}" in sizes) == its_adam
            assert (f"{state}{pion}.{key}" in sizes) == its_pion
    assert sizes[f"{state}{adam}.{fc2.format(2, 1)}"] == (64, 48)
    assert sizes[f"{state}{pion}.{fc2.format(2, 0)}"] == (1, 64, 48)
    assert sizes[f"{state}sigma.whole.{fc2.format(2, 0)}"] == (1, 48)
    # Where all layers have the state, its key is Megatron's own.
    whole = runs.sizes("no matrix", "saved")
    assert whole[f"{state}{adam}.decoder.layers.mlp.linear_fc2.weight"] == (4, 64, 96)
    assert not any("layers.0" in key for key in whole)


@slow
def test_masters_of_subsets_are_read(runs: Runs) -> None:
    from demo import master_weights

    folder = runs.iteration("bf16", "saved", ITERATIONS)
    checkpoint, masters = Checkpoint(folder), master_weights(folder)
    for layer, fc2 in enumerate(("adam", "frozen", "pion", "frozen")):
        name = f"decoder.layers.{layer}.mlp.linear_fc2.weight"
        weight = checkpoint.weights[name]
        read = checkpoint.read(weight)
        assert checkpoint.optimizer(weight) == fc2
        assert torch.equal(read.bfloat16(), checkpoint.read(weight, master=False).bfloat16())
        if fc2 == "frozen":
            assert checkpoint.origin(weight) == "bfloat16" and name not in masters
        else:
            assert checkpoint.origin(weight) == "fp32 master"
            assert torch.equal(read, masters[name])
    mixed = Checkpoint(runs.iteration("mixed", "saved", ITERATIONS))
    expert = "decoder.layers.2.mlp.experts.{}.linear_fc1.weight"
    by = [mixed.optimizer(mixed.weights[expert.format(number)]) for number in range(4)]
    assert by == ["pion", "adam", "pion", "pion"]


def record(layer: int, expert: int, *, gated: bool) -> Any:
    """An expert's weight [2, 3], or [gate; up], as Megatron records it: of 2 layers, 3 experts."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor
    from megatron.core.transformer.mlp import apply_swiglu_sharded_factory

    key, offsets = (
        "decoder.layers.mlp.experts.experts.linear_fc1.weight",
        ((0, layer, 2), (1, expert, 3)),
    )
    data = torch.arange(6.0).view(2, 3) + 10 * (3 * layer + expert)
    whole = ShardedTensor.from_rank_offsets(
        f"optimizer.state.m.{key}", data, *offsets, prepend_axis_num=2
    )
    return apply_swiglu_sharded_factory(whole, offsets) if gated else whole


@pytest.mark.parametrize("gated", [False, True])
def test_a_stack_with_a_hole_is_taken_apart(gated: bool) -> None:
    from megatron_patches import stacks

    def rank(*places: tuple[int, int]) -> dict[int, Any]:
        return {i: {"m": record(*place, gated=gated)} for i, place in enumerate(places)}

    ranks = [rank((0, 0), (0, 2)), rank((1, 0), (1, 1), (1, 2)), {}]
    everyone = [stacks.stacks([state]) for state in ranks]
    (key,) = stacks.incomplete(everyone)
    assert not stacks.incomplete([*everyone, stacks.stacks([rank((0, 1))])])
    before = ranks[1][2]["m"]
    stacks.take_apart(ranks, {key})
    alone = ranks[1][2]["m"]
    name = "optimizer.state.m.decoder.layers.1.mlp.experts.experts.2.linear_fc1.weight"
    assert alone.key == name
    for piece, stacked in zip(*(stacks.pieces(x) for x in (alone, before)), strict=True):
        assert piece.key == name and torch.equal(piece.data, stacked.data)
        assert piece.global_shape == (2, 3) == stacked.global_shape[2:]
        assert piece.global_offset == stacked.global_offset[2:]
        assert piece.axis_fragmentations == stacked.axis_fragmentations[2:]
        piece.validate_metadata_integrity()
    stacks.take_apart(ranks, {key})  # which has no members left
    assert ranks[1][2]["m"] is alone


def test_stacks_of_an_unknown_kind_are_refused() -> None:
    from megatron_patches.stacks import numbered

    assert numbered("a.layers.3.experts.experts.w", (5,)) == "a.layers.3.experts.experts.5.w"
    with pytest.raises(RuntimeError, match="does not say that they are layers"):
        numbered("a.blocks.w", (5,))
