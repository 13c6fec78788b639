"""What the trainings of studies measured, kept as lines of JSON, by what decides their results."""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import math
import os
import statistics
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from megatron_job import PLAIN_FLAGS

from megatron_patches.parser import add_pion_arguments

Record = dict[str, Any]

# Flags that do not decide a result: what is saved, shown or read where, and by which kernels.
_UNIMPORTANT = {
    *("--save", "--ckpt-format", "--save-interval", "--no-save-optim", "--no-save-rng"),
    *("--no-load-optim", "--no-load-rng", "--log-interval", "--num-workers", "--eval-interval"),
    *(flag for flag in PLAIN_FLAGS if flag.startswith("--")),
}
# Options that no result depends on.
_REPORTS = {"recipe", "print_plan", "spectrum_interval", "spectrum_exact", "seed"}
_REPORTS |= {"override_scheduler"}
# All that matters of Pion's options where another optimizer trains: which weights are redrawn.
_OF_INIT = {"init", "init_scale", "qkv", "split_gate", "exclude"}
# What options stand for where a key does not name them. These values never change, whatever the
# defaults become: an option that is deleted leaves the keys of trainings that had the value given
# here as they are, and so does a new one whose value here is what trainings did before it.
_UNNAMED: Mapping[str, Any] = {
    "nesterov": True,
    "eps": 1e-8,
    "lr_mult": 1.0,
    "qkv": "qkv",
    "split_gate": True,
    "exclude": None,
    "matmul_precision": "highest",
    "state_dtype": "fp32",
    "spectrum_reset_interval": 0,
    "init": "keep",
    "init_scale": 1.0,
}
_OF_GENERATORS = {
    *("momentum", "eps", "side", "scaling", "rms", "retraction", "degree"),
    *("state_layout", "blocks", "spectrum_reset_interval"),
}
POINTS = 80  # of a kept training curve


def resolved(flags: Sequence[str]) -> Record:
    """What flags come to: Pion's options by name, and other flags with their values.

    The result is the same for an option that is given and for one that a recipe or a default
    gives, and it has no option that does not apply.

    Args:
        flags: of one training, the studies' own among them.
    """
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--optimizer", default="adam", choices=["adam", "muon"])
    parser.add_argument("--bf16", action="store_true")
    add_pion_arguments(parser)
    # Megatron's arguments that the checks of Pion's look at.
    others = {"lr": None, "lr_warmup_init": 0.0, "tensor_model_parallel_size": 1}
    parser.set_defaults(**others)
    args, rest = parser.parse_known_args(list(flags))
    values = {
        name.removeprefix("pion_"): value
        for name, value in vars(args).items()
        if name.startswith("pion_")
    }
    left_out = _inapplicable(values) if args.optimizer == "pion" else values.keys() - _OF_INIT
    left_out |= {n for n, v in values.items() if n in _UNNAMED and v == _UNNAMED[n]}
    options = {name: values[name] for name in sorted(values.keys() - left_out)}
    if args.bf16:
        options["bf16"] = True
    return {"optimizer": args.optimizer, "pion": options, **dict(_grouped(rest))}


def _inapplicable(values: Mapping[str, Any]) -> set[str]:
    """Names of Pion's options that change nothing beside the others."""
    names = set(_REPORTS)
    if values["direction"] == "polar":
        names |= _OF_GENERATORS
    if values["direction"] != "adaptive":
        names.add("beta2")
    if values["retraction"] != "taylor":
        names.add("degree")
    if values["scaling"] != "rms":
        names.add("rms")
    if values["blocks"] == 1:
        names.add("blocks")
    names |= {"state_layout", "team_size", "offload_state"}  # how moments are stored, and where
    return names


def _grouped(flags: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Each flag with its values; in a dict the last of several counts, as Megatron has it."""
    starts = [i for i, flag in enumerate(flags) if flag.startswith("--")]
    for start, end in zip(starts, [*starts[1:], len(flags)], strict=False):
        if flags[start] not in _UNIMPORTANT:
            yield flags[start], list(flags[start + 1 : end])


def key_of(decides: Any) -> str:
    """A digest of what decides a result."""
    text = json.dumps(decides, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def summary(measured: Record) -> Record:
    """What is kept of what `study_training` wrote: losses, drift, seconds of an iteration."""
    kept: Record = {}
    if "diverged" in measured:
        kept["diverged"] = measured["diverged"]
    else:
        kept["loss"] = round(measured["validation"][0], 6)
    if math.isfinite(measured.get("drift", math.inf)):
        kept["drift"] = float(f"{measured['drift']:.3g}")
        kept["drift_in"] = measured["drift_in"]
    if measured["seconds"]:
        kept["seconds"] = float(f"{_fastest(measured['seconds']):.4g}")
    kept["curve"] = curve(measured["loss"])
    return kept


def _fastest(seconds: Sequence[float]) -> float:
    """The fastest tenth's slowest, since the first iterations warm up."""
    return statistics.quantiles(seconds, n=10)[0] if len(seconds) > 1 else seconds[0]


def curve(losses: Sequence[float], points: int = POINTS) -> list[float]:
    """Training losses at evenly spaced iterations, the last one among them.

    Each is the mean over the twentieth of the training that ends there.
    """
    length = max(1, len(losses) // 20)
    ends = sorted({round(len(losses) * (i + 1) / points) for i in range(points)} - {0})
    means = (statistics.fmean(losses[max(0, end - length) : end]) for end in ends)
    return [round(mean, 4) for mean in means if math.isfinite(mean)]


def reached(curve: Sequence[float], loss: float) -> float | None:
    """The share of a training after which its curve is at ``loss`` or below; None if never."""
    for index, value in enumerate(curve):
        if value <= loss:
            before = curve[index - 1] if index else value
            share = (before - loss) / (before - value) if before > value else 1.0
            return (index + share) / len(curve)
    return None


class Records:
    """A file of records, a line each, by key; several processes may add to it.

    Args:
        path: of the file, which need not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._records = self._read()

    def _read(self) -> dict[str, Record]:
        if not self.path.exists():
            return {}
        lines = map(json.loads, self.path.read_text().splitlines())
        return {record["key"]: record for record in lines}

    def get(self, key: str) -> Record | None:
        """The record of a training, if there is one."""
        with self._lock:
            return self._records.get(key)

    def all(self) -> list[Record]:
        """Every record, in the file's order."""
        with self._lock:
            return sorted(self._records.values(), key=_order)

    def add(self, record: Record) -> None:
        """Put a record into the file, which is replaced as a whole, sorted."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        folder = os.open(self.path.parent, os.O_RDONLY)
        with self._lock:
            fcntl.flock(folder, fcntl.LOCK_EX)
            try:
                self._records = {**self._read(), record["key"]: record}
                lines = [_line(each) for each in sorted(self._records.values(), key=_order)]
                scratch = self.path.with_name(self.path.name + ".tmp")
                scratch.write_text("".join(lines))
                scratch.replace(self.path)
            finally:
                os.close(folder)


def _line(record: Record) -> str:
    return json.dumps(record, separators=(",", ":"), ensure_ascii=False) + "\n"


def _order(record: Record) -> tuple[Any, ...]:
    names = ("corpus", "width", "layers", "iterations", "method", "lr", "rest", "seed", "key")
    return tuple(record[name] for name in names)
