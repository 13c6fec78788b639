"""The report's numbers are NumPy's of the whole weights, for checkpoints of every layout."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from layout_table import GROUPS, HEAD_DIM, HEADS, MODELS
from megatron_runs import COMMON, LIMIT_S, NO_DROPOUT, PION, ROOT, environment, launch

TOOLS = ROOT / "tools"
sys.path.insert(0, str(TOOLS))

from checkpoint_weights import Checkpoint, CheckpointError, view  # noqa: E402
from spectrum_report import (  # noqa: E402
    as_json,
    build,
    hyperspherical_energy,
    main,
    ranks,
    runs_of,
)

from pion_dist import PionConfig  # noqa: E402

slow = pytest.mark.slow

ADAM = ["--optimizer", "adam"]
DIST_OPT = ["--use-distributed-optimizer"]
EVERY = re.compile("")
# Float32 rounds an element by 2**-24 of itself, 6e-8. So singular values move by some 3e-7 of the
# largest, and small ones of square matrices by far more of themselves.
KEPT = 1e-6
LAYERS = range(4)
LINEAR = {  # of COMMON and LLAMA
    "mlp.linear_fc1.weight": (192, 64),
    "mlp.linear_fc2.weight": (64, 96),
    "self_attention.linear_proj.weight": (64, 64),
    "self_attention.linear_qkv.weight": (128, 64),
}


@pytest.fixture(scope="module")
def runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs' folders, each with checkpoints of iterations 2 and 4."""
    folder = tmp_path_factory.mktemp("report")
    data = ["--data-path", str(corpus), "--data-cache-path", str(corpus.parent / "cache")]

    def job(name: str, *flags: str, model: str = "llama") -> dict[str, Any]:
        common = [*COMMON, *MODELS[model], *data, *NO_DROPOUT, "--ckpt-format", "torch_dist"]
        common += ["--train-iters", "4", "--save-interval", "2", "--save", str(folder / name)]
        return {"name": name, "flags": [*common, *flags], "steps": str(folder / f"{name}.json")}

    def train(processes: int, *jobs: dict[str, Any]) -> None:
        file = folder / "jobs.json"
        file.write_text(json.dumps(jobs))
        launch(ROOT / "tests" / "support" / "many_runs.py", str(file), processes=processes)

    short = ["--exit-interval", "2"]
    from_start = ["--load", str(folder / "start"), "--finetune"]
    train(
        1,
        job("start", *PION, "--exit-interval", "1", "--save-interval", "1"),
        job("pion", *PION, *from_start),
        job("adam", *ADAM, *from_start),
        job("muon", "--optimizer", "muon", *from_start),
        job("bf16", *PION, "--bf16", "--pion-exclude", "linear_proj", *short),
        job("buckets", *ADAM, "--bf16", *DIST_OPT, *short),
        job("gathered", *ADAM, "--bf16", *DIST_OPT, "--dist-ckpt-optim-fully-reshardable", *short),
        job("torch", *ADAM, "--ckpt-format", "torch", *short),
    )
    pp2 = ["--pipeline-model-parallel-size", "2"]
    ep2 = ["--expert-model-parallel-size", "2"]
    train(
        4,
        job("cut", *PION, *from_start, "--tensor-model-parallel-size", "2", *pp2, *DIST_OPT),
        job("experts", *PION, *ep2, *pp2, *DIST_OPT, *short, model="moe"),
    )
    return folder


@pytest.fixture(scope="module")
def blocked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose megatron cannot be imported."""
    folder = tmp_path_factory.mktemp("blocked")
    (folder / "megatron").mkdir()
    (folder / "megatron" / "__init__.py").write_text("raise ImportError('not on this machine')\n")
    return folder


@pytest.fixture(scope="module")
def report(runs: Path, blocked: Path) -> Path:
    """The report of three optimizers from one start."""
    return run_tool(runs, blocked, "report")


def run_tool(runs: Path, blocked: Path, name: str) -> Path:
    out = runs / name
    done = subprocess.run(
        [
            *(sys.executable, str(TOOLS / "spectrum_report.py"), "pion", "adam", "muon"),
            *("--start", "start/iter_0000001", "--out", str(out)),
        ],
        env=environment(blocked),
        cwd=runs,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stderr
    return out


def parse(report: Path) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    contents: dict[str, Any] = json.loads(
        (report / "report.json").read_text(), parse_constant=refuse
    )
    return contents


def whole(folder: Path) -> dict[str, np.ndarray]:
    """The 2-D weights as torch assembles them, layers apart, in float64."""
    reader = dcp.FileSystemReader(folder)
    weights = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if name.startswith("decoder.layers.") and name.endswith(tuple(LINEAR))
    }
    dcp.load(weights, storage_reader=reader, no_dist=True)
    return {
        name.replace(".layers.", f".layers.{i}."): weight.double().numpy()
        for name, stacked in weights.items()
        for i, weight in enumerate(stacked)
    }


def by_hand(name: str, weight: np.ndarray) -> dict[str, np.ndarray]:
    """The matrices of a weight, cut without the package's views."""
    if "linear_qkv" in name:
        grouped = weight.reshape(GROUPS, -1, weight.shape[-1])
        query = HEADS // GROUPS * HEAD_DIM
        parts = np.split(grouped, [query, query + HEAD_DIM], axis=1)
        return {
            f"{name}:{part}[0]": rows.reshape(-1, weight.shape[-1])
            for part, rows in zip("qkv", parts, strict=True)
        }
    if "linear_fc1" in name:
        gate, up = np.split(weight, 2)
        return {f"{name}:gate[0]": gate, f"{name}:up[0]": up}
    return {f"{name}:whole[0]": weight}


def numbers(matrix: np.ndarray, start: np.ndarray) -> dict[str, float]:
    """The report's numbers from their definitions."""
    s, before = (np.linalg.svd(x, compute_uv=False) for x in (matrix, start))
    p = s / s.sum()
    unit = matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
    pairs = [(i, j) for i in range(len(unit)) for j in range(i)]
    return {
        "drift": np.max(np.abs(s - before) / before),
        "drift_of_largest": np.max(np.abs(s - before)) / before[0],
        "largest": s[0],
        "smallest": s[-1],
        "condition": s[0] / s[-1],
        "effective_rank": np.exp(-np.sum(p * np.log(p))),
        "stable_rank": np.linalg.norm(matrix) ** 2 / s[0] ** 2,
        "energy": np.mean([1 / np.linalg.norm(unit[i] - unit[j]) for i, j in pairs]),
    }


@slow
def test_numbers_are_numpys_of_the_assembled_weights(runs: Path, report: Path) -> None:
    contents = parse(report)
    entries = {m["name"]: m for m in contents["matrices"]}
    start = whole(runs / "start" / "iter_0000001")
    expected = {matrix for name in start for matrix in by_hand(name, start[name])}
    assert set(entries) == expected and len(expected) == 7 * len(LAYERS)
    for i, run in enumerate(["pion", "adam", "muon"]):
        last = whole(runs / run / "iter_0000004")
        for name in (n for n in start if ".layers.1." in n):
            before = by_hand(name, start[name])
            for matrix, x in by_hand(name, last[name]).items():
                entry = entries[matrix]["runs"][i]["checkpoints"][-1]
                want = numbers(x, before[matrix])
                # A singular value's error is a few times 2**-52 of the largest, a hundred times
                # the smallest here: 1e-13. Drifts are differences of such values.
                for key, value in want.items():
                    close = {"abs": 1e-12} if "drift" in key else {"rel": 1e-11}
                    assert entry[key] == pytest.approx(value, **close), (matrix, key)
                assert entries[matrix]["shape"] == list(x.shape)


@slow
def test_pion_keeps_spectra_and_adam_and_muon_do_not(report: Path) -> None:
    contents = parse(report)
    for i in range(3):
        last = [m["runs"][i]["checkpoints"][-1] for m in contents["matrices"]]
        if contents["runs"][i]["name"] == "pion":
            assert max(each["drift_of_largest"] for each in last) < KEPT
        else:
            assert max(each["drift"] for each in last) > 1e-2
    for name, i in (("pion", 0), ("adam", 1), ("muon", 2)):
        assert contents["runs"][i]["name"] == name
        assert {m["runs"][i]["checkpoints"][0]["optimizer"] for m in contents["matrices"]} == {name}


@slow
def test_json_has_the_documented_form(runs: Path, report: Path) -> None:
    contents = parse(report)
    text = (ROOT / "docs" / "spectrum_report.md").read_text()
    number, measured = (int, float), set()
    assert contents.keys() == {"format", "cut", "start", "runs", "matrices", "left_out"}
    assert contents["cut"] == {"qkv": "qkv", "split_gate": True}
    for run in contents["runs"]:
        assert run.keys() == {"name", "optimizer", "checkpoints"}
        assert [c["iteration"] for c in run["checkpoints"]] == [2, 4]
    for m in contents["matrices"]:
        assert m.keys() == {"name", "weight", "kind", "layer", "shape", "ranks", "runs"}
        assert m["layer"] in LAYERS and m["name"].startswith(m["weight"])
        assert m["ranks"][0] == 0 and m["ranks"][-1] == min(m["shape"]) - 1
        for run in m["runs"]:
            assert run.keys() == {"start", "checkpoints"} and run["start"]["drift"] == 0
            for each in [run["start"], *run["checkpoints"]]:
                measured |= each.keys()
                values = each["values"]
                assert len(values) == len(m["ranks"]) and values == sorted(values, reverse=True)
                assert (each["largest"], each["smallest"]) == (values[0], values[-1])
                assert each["read"] == "float32" and each["energy_rows"] == m["shape"][0]
                words = {"read", "optimizer", "values"}
                assert all(isinstance(each[k], number) for k in each.keys() - words)
    assert all(f"`{name}`" in text for name in contents.keys() | measured)
    assert set(contents["left_out"]) == {"embedding.word_embeddings.weight", "output_layer.weight"}


class Page(html.parser.HTMLParser):
    """What a page refers to, and its table's rows."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.refers: list[str] = []
        self.rows = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.refers += [value or "" for name, value in attrs if name in ("src", "href")]
        self.rows += tag == "tr"


@slow
def test_the_page_stands_alone_and_is_the_same_each_time(
    runs: Path, blocked: Path, report: Path
) -> None:
    text = (report / "report.html").read_text()
    page = Page(text)
    assert all(each.startswith("data:image/svg+xml;base64,") for each in page.refers)
    assert len(page.refers) == 2 + len(LAYERS)  # overview, trends
    assert page.rows == (1 + 3) + (1 + 3 * 7 * len(LAYERS))  # the runs', every matrix's
    assert "no such" not in text and "None" not in text and "nan" not in text.lower()
    again = run_tool(runs, blocked, "again")
    for name in ("report.html", "report.json"):
        assert (again / name).read_bytes() == (report / name).read_bytes(), name


@slow
def test_layouts_give_the_same_weights_and_table(runs: Path) -> None:
    one, cut = (Checkpoint(runs / name / "iter_0000004") for name in ("pion", "cut"))
    assert list(one.weights) == list(cut.weights)
    contents = as_json(build(runs_of([runs / "pion", runs / "cut"]), None, EVERY))
    for name, weight in one.weights.items():
        a, b = one.read(weight), cut.read(cut.weights[name])
        # Adam divides by a gradient's own size. So elements whose gradient is rounding error move
        # freely: one of these 16,384 differs by 9e-5, all others by 2e-6 at most. A quarter of what
        # the layout table allows after 20 iterations; these are 4.
        free = a.numel() // 1000 if name in contents["left_out"] else 0
        differences = (a - b).flatten().abs().sort().values[: a.numel() - free]
        assert differences.norm() < 5e-6 * a.norm(), name
    keys = ("largest", "smallest", "condition", "effective_rank", "stable_rank", "energy")
    for m in contents["matrices"]:
        for a, b in zip(*(run["checkpoints"] for run in m["runs"]), strict=True):
            assert max(a["drift_of_largest"], b["drift_of_largest"]) < KEPT
            # The smallest value, and with it the condition, move by up to KEPT times the condition.
            # A row that differs by 2e-5 turns by as much, which an inverse distance of 0.7 follows.
            rel = max(1e-4, 2 * KEPT * a["condition"])
            assert [a[k] for k in keys] == pytest.approx([b[k] for k in keys], rel=rel), m["name"]


@slow
def test_experts_are_weights_of_their_own(runs: Path) -> None:
    folder = runs / "experts" / "iter_0000002"
    checkpoint = Checkpoint(folder)
    reader = dcp.FileSystemReader(folder)
    key = "decoder.layers.mlp.experts.experts.linear_fc1.weight"
    stacked = {key: torch.empty(reader.read_metadata().state_dict_metadata[key].size)}
    dcp.load(stacked, storage_reader=reader, no_dist=True)
    for layer in LAYERS:
        for expert in range(4):
            name = f"decoder.layers.{layer}.mlp.experts.{expert}.linear_fc1.weight"
            weight = checkpoint.weights[name]
            torch.testing.assert_close(
                checkpoint.read(weight), stacked[key][layer, expert], rtol=0, atol=0
            )
            cut = view(weight, checkpoint.args, PionConfig())
            assert cut.shapes == {"gate": (1, 48, 64), "up": (1, 48, 64)}  # type: ignore[union-attr]
    assert "decoder.layers.0.mlp.router.weight" in checkpoint.weights


@slow
@pytest.mark.parametrize(
    ("run", "read", "key"),
    [
        ("bf16", "fp32 master", "optimizer.state.fp32_param."),
        ("gathered", "fp32 master", "optimizer.state.param."),
        ("buckets", "bfloat16", ""),
    ],
)
def test_masters_are_read_where_they_are_whole(runs: Path, run: str, read: str, key: str) -> None:
    checkpoint = Checkpoint(runs / run / "iter_0000002")
    stacked = "decoder.layers.mlp.linear_fc2.weight"
    reader = dcp.FileSystemReader(checkpoint.folder)
    stored = {
        k: torch.empty((4, 64, 96), dtype=dtype)
        for k, dtype in ((key + stacked, torch.float32 if key else torch.bfloat16),)
    }
    dcp.load(stored, storage_reader=reader, no_dist=True)
    weight = checkpoint.weights["decoder.layers.2.mlp.linear_fc2.weight"]
    assert checkpoint.origin(weight) == read
    assert torch.equal(checkpoint.read(weight), stored[key + stacked][2].float())
    model = checkpoint.read(weight, master=False)
    assert torch.equal(model, checkpoint.read(weight).bfloat16().float())
    assert checkpoint.origin(weight, master=False) == "bfloat16"
    excluded = checkpoint.weights["decoder.layers.2.self_attention.linear_proj.weight"]
    steps = "pion" if run == "bf16" else "adam"
    assert (checkpoint.optimizer(weight), checkpoint.optimizer(excluded)) == (steps, "adam")


def damaged(runs: Path, tmp_path: Path, damage: Callable[[Path], object]) -> Path:
    folder = tmp_path / "iter_0000002"
    shutil.copytree(runs / "pion" / "iter_0000002", folder)
    damage(folder)
    return folder


def piece(folder: Path) -> Any:
    """Where a weight's first piece is stored."""
    stored = dcp.FileSystemReader(folder).read_metadata().storage_data
    return next(v for k, v in stored.items() if k.fqn == "decoder.layers.mlp.linear_fc2.weight")


def cut_short(folder: Path) -> None:
    """As an interrupted copy leaves it."""
    stored = piece(folder)
    file = folder / stored.relative_path
    file.write_bytes(file.read_bytes()[: stored.offset + stored.length // 2])


def blank(folder: Path) -> None:
    """As a disk leaves it that lost a block."""
    stored = piece(folder)
    with (folder / stored.relative_path).open("r+b") as file:
        file.seek(stored.offset)
        file.write(bytes(stored.length))


@slow
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / "__0_0.distcp").unlink(), r"common_state\S* cannot be read .FileNotFound"),
        (cut_short, r"(common_state|decoder\.layers)\S* cannot be read"),  # whatever was behind
        (blank, r"decoder\.layers\.mlp\.linear_fc2\.weight cannot be read"),
        (lambda f: (f / ".metadata").write_bytes(b"x"), r"\.metadata cannot be read"),
        (lambda f: (f / ".metadata").unlink(), "not complete"),
        (lambda f: (f / "metadata.json").write_text("{}"), "metadata.json cannot be read"),
        (
            lambda f: (f / "metadata.json").write_text('{"sharded_backend": "zarr"}'),
            "of format zarr; torch_dist is needed",
        ),
    ],
    ids=["no file", "short file", "blank", "metadata", "no metadata", "json", "zarr"],
)
def test_damage_is_named(
    runs: Path, tmp_path: Path, damage: Callable[[Path], object], says: str
) -> None:
    folder = damaged(runs, tmp_path, damage)
    with pytest.raises(CheckpointError, match=says) as error:
        build(runs_of([folder]), None, EVERY)
    assert str(folder) in str(error.value)


@slow
def test_errors_of_the_command(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def says(*arguments: str) -> str:
        command = ["spectrum_report.py", *arguments, "--out", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code not in (0, None) and not (tmp_path / "out").exists()
        return f"{stop.value.code} {capsys.readouterr().err}"

    pion = str(runs / "pion")
    other = says(pion, str(runs / "experts"))
    assert "different models: decoder.layers.0.mlp.experts.0.linear_fc1.weight is missing" in other
    convert = says(str(runs / "torch"))
    assert "--ckpt-format torch" in convert and "--ckpt-convert-format torch_dist" in convert
    assert "is no regular expression" in says(pion, "--only", "(")


def write(folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    """A checkpoint in torch's form without anything of Megatron's but its file of the format."""
    dcp.save(weights, checkpoint_id=folder, no_dist=True)
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    return folder


def test_paths_that_are_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        runs_of([tmp_path / "nowhere"])
    with pytest.raises(CheckpointError, match=r"has no metadata\.json"):
        runs_of([tmp_path])
    vectors = write(tmp_path / "iter_0000001", {"decoder.layers.0.norm.weight": torch.ones(3)})
    with pytest.raises(CheckpointError, match="no 2-D weight"):
        runs_of([vectors])


def test_without_arguments_weights_are_whole_and_zeros_have_no_condition(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 8, generator=generator)
    name, empty = "decoder.layers.0.self_attention.linear_qkv", "decoder.layers.1.mlp.linear_fc2"
    folder = tmp_path / "run" / "iter_0000007"
    write(folder, {f"{name}.weight": x, f"{empty}.weight": torch.zeros(4, 4)})
    (run,) = runs_of([tmp_path / "run"])
    contents = as_json(build([run], None, EVERY))
    assert contents["runs"] == [
        {
            "name": "run",
            "optimizer": "unknown",
            "checkpoints": [{"iteration": 7, "folder": str(folder)}],
        }
    ]
    names = [f"{name}.weight:whole[0]", f"{empty}.weight:whole[0]"]
    assert [m["name"] for m in contents["matrices"]] == names
    zero = contents["matrices"][1]["runs"][0]["checkpoints"][0]
    assert (zero["condition"], zero["energy"], zero["effective_rank"]) == (None, None, 0)
    json.dumps(contents, allow_nan=False)
    only = build(runs_of([tmp_path / "run"]), None, re.compile("linear_fc2"))
    assert [m.name for m in only.matrices] == names[1:]
    with pytest.raises(CheckpointError, match="--only 'fc3'"):
        build([run], None, re.compile("fc3"))


def test_elements_that_are_not_finite_are_named(tmp_path: Path) -> None:
    x = torch.eye(4)
    x[1, 2] = torch.nan
    write(tmp_path / "iter_0000001", {"decoder.layers.0.mlp.linear_fc2.weight": x})
    with pytest.raises(CheckpointError, match=r"linear_fc2\.weight has elements that are NaN"):
        build(runs_of([tmp_path]), None, EVERY)


def test_arguments_of_a_file_of_their_own(tmp_path: Path) -> None:

    folder = write(
        tmp_path / "iter_0000001", {"decoder.layers.0.mlp.linear_fc1.weight": torch.eye(4)}
    )
    args = Namespace(swiglu=True, optimizer="adam", unknown=Trap())
    torch.save({"args": args, "iteration": 1}, folder / "common.pt")
    Trap.sprung = False
    contents = as_json(build(runs_of([folder]), None, EVERY))
    assert [m["name"].partition(":")[2] for m in contents["matrices"]] == ["gate[0]", "up[0]"]
    assert not Trap.sprung, "an object of the file ran"


class Trap:
    """Notes that it was unpickled."""

    sprung = False

    def __setstate__(self, state: object) -> None:
        Trap.sprung = True

    def __reduce__(self) -> tuple[object, tuple[()], dict[str, int]]:
        return Trap, (), {"x": 1}


def test_energy_of_known_directions_and_of_a_sample() -> None:
    # Three rows at right angles: distances of sqrt(2), whatever their lengths; zeros are left out.
    rows = torch.tensor([[3.0, 0, 0], [0, 0.1, 0], [0, 0, 7], [0, 0, 0]])
    energy, count = hyperspherical_energy(rows)
    assert energy == pytest.approx(2**-0.5, rel=1e-15) and count == 3
    generator = torch.Generator().manual_seed(0)
    many = torch.randn(5000, 8, generator=generator, dtype=torch.float64)
    exact = (1 / torch.pdist(many / many.norm(dim=1, keepdim=True))).mean().item()
    energy, count = hyperspherical_energy(many)
    # Directions are uniform, so pairs are nearly independent: a mean over 4096**2 / 2 of them, of
    # standard deviation 0.2 each, is 7e-5 off; four times that.
    assert count == 4096 and energy == pytest.approx(exact, abs=3e-4)
    assert hyperspherical_energy(many) == (energy, count)


@pytest.mark.parametrize("count", [1, 2, 64, 65, 8192])
def test_kept_singular_values_have_both_ends(count: int) -> None:
    kept = ranks(count)
    assert kept == sorted(set(kept)) and (kept[0], kept[-1]) == (0, count - 1)
    assert len(kept) == count if count <= 64 else 40 < len(kept) <= 64
