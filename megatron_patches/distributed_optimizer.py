"""Pion in Megatron's own distributed optimizer, which shards, reduces and gathers as for Adam.

``--use-distributed-optimizer`` makes Megatron's ``DistributedOptimizer``, unmodified: Megatron
builds it for Adam over all parameters. Then the optimizer inside is replaced by one that steps
Pion's groups by Pion. Pion gets the ranges of weights that this rank stores, and brings what is to
be computed to the ranks that compute it.
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import itertools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from pion_dist import Pion
from pion_dist.classify import Rotated
from pion_dist.dealing import ranges
from pion_dist.slots import Storage

from . import seams
from .parameters import NOT_PION, decided
from .process_groups import grid_of, make_teams
from .sharded_state import CheckpointedPion

# Set on the config that Megatron makes its optimizer with, which says Adam.
WITH_PION = "with_pion"


def apply() -> None:
    """Have Megatron take ``--use-distributed-optimizer`` for Pion as it takes it for Adam."""
    if not seams.has_training():
        return
    arguments: Any = importlib.import_module("megatron.training.arguments")
    arguments.validate_args = _as_for_adam(arguments.validate_args)
    arguments._print_args = _with_own_name(arguments._print_args)
    initialize: Any = importlib.import_module("megatron.training.initialize")
    if hasattr(initialize, "validate_args"):  # of Megatron 0.18
        initialize.validate_args = arguments.validate_args


def _as_for_adam(original: Any) -> Any:
    """Validate arguments as Adam's: of others Megatron turns the flag into another optimizer's."""

    @functools.wraps(original)
    def validate_args(args: Any, *more: Any, **kwargs: Any) -> Any:
        if args.optimizer != "pion":
            return original(args, *more, **kwargs)
        args.optimizer, args.pion_validated = "adam", True
        try:
            return original(args, *more, **kwargs)
        finally:
            _name(args)

    return validate_args


def _with_own_name(original: Any) -> Any:
    """Print the arguments of Pion's run, which are printed while they are validated."""

    @functools.wraps(original)
    def print_args(title: str, args: Any) -> Any:
        _name(args)
        return original(title, args)

    return print_args


def _name(args: Any) -> None:
    if args.__dict__.pop("pion_validated", False):
        args.optimizer = "pion"


def make(
    original: Callable[..., Any],
    config: Any,
    model_chunks: Sequence[Any],
    *args: Any,
    kwargs_of: Callable[..., Mapping[str, Any]],
    **kwargs: Any,
) -> Any:
    """Make Megatron's optimizer for Adam, and put Pion into it.

    Args:
        original: get_megatron_optimizer.
        config: Megatron's OptimizerConfig, of Pion.
        model_chunks: as get_megatron_optimizer gets them.
        args: further arguments of get_megatron_optimizer.
        kwargs_of: makes Pion's arguments from config, chunks and process groups.
        kwargs: further arguments of get_megatron_optimizer.
    """
    core: Any = importlib.import_module("megatron.core.optimizer")
    given = inspect.signature(original).bind(config, model_chunks, *args, **kwargs)
    given.apply_defaults()
    own = copy.copy(config)  # it carries what is no field, as timers
    own.optimizer = "adam"
    setattr(own, WITH_PION, True)
    overrides = given.arguments["config_overrides"]
    if overrides is None:
        overrides = core.get_standard_config_overrides(own)
    overrides = {**overrides, NOT_PION: {"optimizer": "adam"}}
    optimizer = original(**{**given.arguments, "config": own, "config_overrides": overrides})
    groups = given.arguments["pg_collection"]
    for leaf in leaves(optimizer):
        _put_pion(leaf, kwargs_of(config, leaf.model_chunks, groups), overrides)
    return optimizer


class PionAndAdam:
    """The optimizer in a DistributedOptimizer: Pion for its groups, Megatron's Adam for the others.

    Attributes:
        pion: steps its groups; its weights are stored in ranges.
        adam: as Megatron made it, with the other groups alone.
        weights: Pion's model parameters, in the order of its state.
    """

    def __init__(
        self, pion: CheckpointedPion, adam: Any, of_pion: Sequence[bool], weights: Sequence[Any]
    ) -> None:
        """Join the groups; ``of_pion`` says of each whether it is Pion's."""
        self.pion, self.adam, self.weights = pion, adam, list(weights)
        self._of_pion = list(of_pion)
        self.defaults = adam.defaults

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """All groups, in Megatron's order."""
        pions, adams = iter(self.pion.param_groups), iter(self.adam.param_groups)
        return [next(pions if mine else adams) for mine in self._of_pion]

    @property
    def state(self) -> Any:
        """Adam's state by parameter, which Megatron looks into."""
        return self.adam.state

    def state_dict(self) -> dict[str, Any]:
        """Refuse: a rank's ranges mean nothing without the other ranks'.

        Raises:
            ValueError: says what to call.
        """
        raise ValueError(
            "state_dict() of --optimizer pion with --use-distributed-optimizer needs --ckpt-format "
            "torch_dist, whose state is sharded_state_dict()"
        )

    def step(self) -> None:
        """Step both."""
        self.pion.step()
        self.adam.step()


def leaves(optimizer: Any) -> Iterator[Any]:
    """The optimizers of a chain that hold something."""
    chain = getattr(optimizer, "chained_optimizers", None)
    if chain is not None:
        for each in chain:
            yield from leaves(each)
    elif not getattr(optimizer, "is_stub_optimizer", False):
        yield optimizer


def pions(optimizer: Any) -> list[Pion]:
    """Every Pion in a chain on this rank."""
    inner = (leaf.optimizer for leaf in leaves(optimizer))
    each = (i.pion if isinstance(i, PionAndAdam) else i for i in inner)
    return [pion for pion in each if isinstance(pion, Pion)]


def _put_pion(leaf: Any, kwargs: Mapping[str, Any], overrides: Any) -> None:
    """Replace the optimizer in a distributed one (modified in place); a collective of all ranks."""
    core: Any = importlib.import_module("megatron.core.optimizer")
    adam = leaf.optimizer
    expert = adam.param_groups[0]["is_expert_parallel"]
    # As Megatron had them before it put what this rank stores in the parameters' place.
    groups = core._get_param_groups(leaf.model_chunks, leaf.config, overrides)
    groups = [group for group in groups if group["is_expert_parallel"] == expert]
    of_pion = ["optimizer" not in group for group in groups]
    if not any(of_pion):
        return
    mine = list(itertools.compress(groups, of_pion))
    tensors, dp = stored_shards(leaf), leaf.data_parallel_group
    tp = leaf.expert_tp_group if expert else leaf.tp_group
    minutes = leaf.config.pion_timeout
    grid = grid_of(tp, dp, minutes)
    stored = {}
    for p in (p for group in mine for p in group["params"]):
        decision = decided(p)[1]
        of_whole = isinstance(decision, Rotated) and decision.of_whole
        cut = of_whole or (p in kwargs["shards"] and kwargs["views"][p].axis is not None)
        nothing = torch.empty(0, dtype=torch.float32, device=p.device)
        data, parts = tensors.get(p, nothing), stored_ranges(leaf, p)
        group = grid if cut else (dp if dp.size() > 1 else None)
        if of_whole:  # rank r of the grid has a range of the rows of r % tp.size()
            numel = p.numel()
            starts = range(0, numel * tp.size(), numel)
            parts = tuple((at + a, at + b) for a, b in parts for at in starts)
        stored[p] = Storage(data, group, parts if len(parts) > 1 else ())
    storing = dict.fromkeys(group for group in (grid, dp) if group is not None and group.size() > 1)
    made = make_teams(list(storing), kwargs["config"], tp, minutes)
    kwargs = {**kwargs, "stored": stored, "teams": made}
    pion = CheckpointedPion(mine, **kwargs)
    as_adams = itertools.compress(adam.param_groups, of_pion)
    for own, group in zip(pion.param_groups, as_adams, strict=True):
        own["params"] = group["params"]  # in the order that Megatron relies on
    adam.param_groups = list(itertools.compress(adam.param_groups, map(operator.not_, of_pion)))
    leaf.optimizer = PionAndAdam(pion, adam, of_pion, list(stored))


def stored_shards(leaf: DistributedOptimizer) -> dict[torch.Tensor, torch.Tensor]:
    """The tensor that is stepped of each parameter of which this rank stores a range."""
    pairs = (
        (leaf.model_fp32_groups, leaf.shard_fp32_groups),
        (leaf.model_float16_groups, leaf.shard_fp32_from_float16_groups),
    )
    return {
        param: shard
        for model, shards in pairs
        for params, tensors in zip(model, shards, strict=True)
        for param, shard in zip(params, tensors, strict=True)
    }


def stored_ranges(leaf: Any, param: Any) -> tuple[tuple[int, int], ...]:
    """The elements [start, stop) of a parameter that each data-parallel rank stores."""
    (buffer,) = (buffer for buffer in leaf.buffers if param in buffer.param_index_map)
    start, stop, number = buffer.param_index_map[param]
    bucket, dp = buffer.buckets[number], leaf.data_parallel_group
    place = bucket.offset, bucket.offset + bucket.grad_data.numel()
    everyones = ranges(start, stop, place, dp.size())
    own = (0, 0)
    if param in leaf.model_param_gbuf_map:
        says = leaf._get_model_param_range_map(param)["param"]
        own = says.start, says.end
    mine = everyones[dp.rank()]
    if mine != own and (own != (0, 0) or mine[0] < mine[1]):
        raise seams.SeamError(
            f"DistributedOptimizer stores elements {own} of a parameter where its buffers say "
            f"{mine}: this Megatron divides them in a way that pion_dist does not know"
        )
    return everyones
