"""Weights of Megatron's torch_dist checkpoints, one at a time: no GPU, no Megatron, any layout.

Megatron writes whole tensors' names and sizes, whatever ranks shared them, so a weight is found by
its name and put together from the pieces that hold its rows and columns. Layers of a kind, and a
layer's experts, are one tensor there; here they are weights of their own, named as in the model.
"""

from __future__ import annotations

import io
import json
import pickle
import re
from argparse import Namespace
from collections import OrderedDict
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from pion_dist import PionConfig
from pion_dist.classify import ParamInfo, Rotated, Scalar, classify, query_group
from pion_dist.matrices import MatrixView
from pion_dist.state import is_key

# Names of stacks: all layers of a kind, or a layer's routed experts, in one tensor. Where a number
# follows, each has a tensor of its own, as layers and experts with different state have.
_STACKED = re.compile(r"\.(layers|experts\.experts)\.(?!\d)")
_STATE = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.(.+)")
# Where optimizers keep a float32 master: one that is not distributed, or Megatron's layer-wise one;
# Megatron's distributed one with --dist-ckpt-optim-fully-reshardable.
_MASTERS = ("fp32_param.", "param.")


class CheckpointError(Exception):
    """What is wrong with a checkpoint and what to do, for the user."""


@dataclass(frozen=True)
class Weight:
    """A 2-D weight of the model.

    Attributes:
        name: in the whole model, with the numbers of its layer and expert.
        key: of the checkpoint's tensor that has it.
        place: which layer and expert of that tensor.
        shape: rows and columns.
    """

    name: str
    key: str
    place: tuple[int, ...]
    shape: tuple[int, int]


class Checkpoint:
    """A torch_dist checkpoint of one iteration.

    Attributes:
        folder: that holds it.
        iteration: of the training.
        args: Megatron's arguments of the training; empty where the checkpoint does not have them.
        weights: all 2-D weights by name, in the model's order.

    Raises:
        CheckpointError: there is no readable torch_dist checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        _check_format(folder)
        self.folder = folder
        self._reader = FileSystemReader(folder)
        try:
            self._metadata: Metadata = self._reader.read_metadata()
            self._reader.set_up_storage_reader(self._metadata, True)
        except Exception as error:  # whatever unpickling a broken file raises
            raise _unreadable(f"{folder}/.metadata", error) from error
        self._tensors = {
            key: entry
            for key, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self._places: dict[str, dict[tuple[int, ...], list[ChunkStorageMetadata]]] = {}
        self._masters, self._steppers = self._optimizer_state()
        common = self._common()
        self.args: Namespace = common.get("args") or Namespace()
        numbered = re.fullmatch(r"iter_(\d+)", folder.name)
        self.iteration = int(numbered[1] if numbered else common.get("iteration", 0))
        weights = [weight for key in self._tensors for weight in self._weights_of(key)]
        self.weights = {w.name: w for w in sorted(weights, key=lambda weight: natural(weight.name))}
        if not self.weights:
            raise CheckpointError(f"{folder} has no 2-D weight")

    def read(self, weight: Weight, *, master: bool = True) -> Tensor:
        """A weight [R, C] as float32.

        Args:
            weight: of ``weights``.
            master: the optimizer's float32 one, where there is one; else the model's.

        Raises:
            CheckpointError: a file is missing or damaged, or an element is not finite.
        """
        source = self._source(weight) if master else weight
        key, place = source.key, source.place
        entry = replace(self._tensors[key], chunks=self._pieces(key).get(place, []))
        offsets = torch.Size((*place, 0, 0))
        sizes = torch.Size((*(1 for _ in place), *weight.shape))
        # NaN stays where the checkpoint has no piece.
        target = torch.full(sizes, torch.nan, dtype=torch.float32)
        items = create_read_items_for_chunk_list(
            key, entry, [ChunkStorageMetadata(offsets=offsets, sizes=sizes)]
        )
        try:
            self._reader.read_data(LoadPlan(items), _Into(target)).wait()
        except Exception as error:  # torch.load raises whatever its zip or pickle reader does
            raise _unreadable(f"{self.folder}: {key}", error) from error
        if not target.isfinite().all():
            raise CheckpointError(
                f"{self.folder}: {key} has elements that are NaN, infinite or missing; "
                "leave this checkpoint out"
            )
        return target.view(weight.shape)

    def origin(self, weight: Weight, *, master: bool = True) -> str:
        """What ``read`` reads: the fp32 master, or the weight in the model's own dtype."""
        if master and self._source(weight) is not weight:
            return "fp32 master"
        return str(self._tensors[weight.key].properties.dtype).removeprefix("torch.")

    def optimizer(self, weight: Weight) -> str:
        """Who steps the weight: Pion leaves to Adam what --pion-exclude names; or ``frozen``."""
        name: str = getattr(self.args, "optimizer", "unknown")
        if name != "pion" or not self._steppers:  # --no-save-optim
            return name
        return self._steppers.get(weight.name, "frozen")

    def _pieces(self, key: str) -> dict[tuple[int, ...], list[ChunkStorageMetadata]]:
        """A tensor's pieces by the layer and expert of which they have rows."""
        if key not in self._places:
            places = self._places[key] = {}
            for chunk in self._tensors[key].chunks:
                pairs = list(zip(chunk.offsets, chunk.sizes, strict=True))[:-2]
                for place in product(*(range(start, start + n) for start, n in pairs)):
                    places.setdefault(place, []).append(chunk)
        return self._places[key]

    def _source(self, weight: Weight) -> Weight:
        """The weight's master, if there is one of its shape, or the weight."""
        master = self._masters.get(weight.name, weight)
        # Older Megatrons wrote masters flattened, in other sizes: not read here.
        return master if master.shape == weight.shape else weight

    def _optimizer_state(self) -> tuple[dict[str, Weight], dict[str, str]]:
        """Masters by their weights' names, and who steps these weights, as moments tell."""
        masters: dict[str, Weight] = {}
        steppers: dict[str, str] = {}
        for key in self._tensors:
            if not (state := _STATE.fullmatch(key)):
                continue
            for prefix in (prefix for prefix in _MASTERS if state[1].startswith(prefix)):
                masters |= {w.name: w for w in self._members(key, state[1].removeprefix(prefix))}
            moment, _, weight = state[1].partition(".")
            part, _, of_part = weight.partition(".")
            if moment == "exp_avg":
                steppers |= dict.fromkeys(self._names(key, weight), "adam")
            elif is_key(f"{moment}.{part}"):
                steppers |= dict.fromkeys(self._names(key, of_part), "pion")
        return masters, steppers

    def _weights_of(self, key: str) -> list[Weight]:
        if "optimizer." in key or not self._tensors[key].properties.dtype.is_floating_point:
            return []
        return self._members(key, key)

    def _members(self, key: str, name: str) -> list[Weight]:
        """The 2-D weights in a tensor, which is called ``name`` in the model."""
        size = self._tensors[key].size
        leading = len(_STACKED.findall(name))
        if len(size) - leading != 2:
            return []
        names = self._names(key, name)
        return [Weight(n, key, place, (size[-2], size[-1])) for n, place in names.items()]

    def _names(self, key: str, name: str) -> dict[str, tuple[int, ...]]:
        """Names in the model of what is stacked in a tensor, and where it is."""
        leading = len(_STACKED.findall(name))
        places = product(*(range(count) for count in self._tensors[key].size[:leading]))
        return {_name(name, place): place for place in places}

    def _common(self) -> dict[str, Any]:
        """What is no tensor: an entry of the checkpoint, or a file of older Megatrons'."""
        file = self.folder / "common.pt"
        key = "common_state/shard_0_1"
        try:
            if file.exists():
                data = io.BytesIO(file.read_bytes())
            elif isinstance(self._metadata.state_dict_metadata.get(key), BytesStorageMetadata):
                data = self._bytes(key)
            else:
                return {}
            loaded = torch.load(data, weights_only=False, pickle_module=_SAFE)
        except Exception as error:  # as in read
            what = file if file.exists() else f"{self.folder}: {key}"
            raise _unreadable(str(what), error) from error
        return loaded[0] if isinstance(loaded, list) else loaded

    def _bytes(self, key: str) -> io.BytesIO:
        (index,) = (index for index in self._reader.storage_data if index.fqn == key)
        nothing = torch.Size((0,))
        item = ReadItem(
            LoadItemType.BYTE_IO,
            dest_index=index,
            dest_offsets=nothing,
            storage_index=index,
            storage_offsets=nothing,
            lengths=nothing,
        )
        into = _Into(torch.empty(0))
        self._reader.read_data(LoadPlan([item]), into).wait()
        return into.bytes


class _Into(DefaultLoadPlanner):
    """Reads a part of one tensor."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self.target = target
        self.bytes = io.BytesIO()

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        part = self.target
        for dim, (start, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            part = part.narrow(dim, start, length)
        return part

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass  # it was read into its place

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.bytes = value


class _Unknown(dict[Any, Any]):
    """Stands for what Megatron pickled and nobody needs here."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    __hash__ = object.__hash__  # type: ignore[assignment]  # it may be a key

    def __setstate__(self, _: Any) -> None: ...

    def append(self, _: Any) -> None: ...


class _Unpickler(pickle.Unpickler):
    """Builds no objects but plain ones: no import of Megatron, and nothing in the file is run."""

    def find_class(self, module: str, name: str) -> Any:
        known = {("argparse", "Namespace"): Namespace, ("collections", "OrderedDict"): OrderedDict}
        return known.get((module, name), _Unknown)


_SAFE = SimpleNamespace(__name__="plain objects", Unpickler=_Unpickler)


def _check_format(folder: Path) -> None:
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    if any(folder.glob("mp_rank_*")):
        raise CheckpointError(
            f"{folder} is a checkpoint of --ckpt-format torch, each rank's own; torch_dist is "
            "needed: start the training's command with --ckpt-convert-format torch_dist "
            "--ckpt-convert-save FOLDER, which loads, saves to FOLDER/torch_dist and ends"
        )
    file = folder / "metadata.json"
    try:
        backend = json.loads(file.read_text())["sharded_backend"]
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} has no metadata.json, which torch_dist writes last: give "
            "iter_* folders that have one, or a folder with only such in it"
        ) from None
    except (ValueError, TypeError, KeyError) as error:
        raise _unreadable(str(file), error) from error
    if backend != "torch_dist":
        raise CheckpointError(f"{folder} is of format {backend}; torch_dist is needed")
    if not (folder / ".metadata").exists():
        raise CheckpointError(f"{folder} is not complete: it has no .metadata")


def _unreadable(what: str, error: Exception) -> CheckpointError:
    first = str(error).partition("\n")[0] or "nothing there"
    return CheckpointError(
        f"{what} cannot be read ({type(error).__name__}: {first}): copy the checkpoint anew, or "
        "leave it out"
    )


def natural(name: str) -> list[Any]:
    """Sorts layer 2 before layer 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _name(key: str, place: tuple[int, ...]) -> str:
    numbers = iter(place)
    numbered = _STACKED.sub(lambda stack: f"{stack[0]}{next(numbers)}.", key)
    return numbered.replace(".experts.experts.", ".experts.")


def pion_config(args: Namespace) -> PionConfig:
    """The training's options that say how Pion cuts weights into matrices, or the defaults."""
    names = {"qkv": "pion_qkv", "split_gate": "pion_split_gate"}
    return PionConfig(**{k: getattr(args, v) for k, v in names.items() if hasattr(args, v)})


def view(weight: Weight, args: Namespace, config: PionConfig) -> MatrixView | Scalar:
    """A weight as the matrices that Pion rotates; whole where the arguments do not say how."""
    linear = weight.name.rpartition(".")[0].rpartition(".")[2]
    geometry: dict[str, Any] = {}
    if linear == "linear_qkv" and getattr(args, "kv_channels", None):
        grouped = getattr(args, "group_query_attention", False)
        groups = args.num_query_groups if grouped else args.num_attention_heads
        gated = getattr(args, "attention_output_gate", False)
        heads = args.num_attention_heads // groups
        group = query_group(args.kv_channels, heads=heads, gated=gated)
        if weight.shape[0] == groups * sum(rows for _, rows in group):  # they are its heads
            geometry = {"qkv": group, "head_dim": args.kv_channels}
    elif linear == "linear_fc1":
        gated = getattr(args, "swiglu", False) or getattr(args, "quick_geglu", False)
        interleave = getattr(args, "moe_mlp_glu_interleave_size", None) or 0
        geometry = {"gated": gated, "gate_interleave": interleave}
    info = ParamInfo(
        name=weight.name,
        shape=weight.shape,
        embedding_or_output=bool(re.search(r"(^|\.)(embedding|output_layer)\.", weight.name)),
        **geometry,
    )
    decision = classify(info, config)
    return decision.view if isinstance(decision, Rotated) else decision
