"""Megatron's layer-wise distributed optimizer, made to hold Pion.

In float32 too; weights are dealt to ranks by what Pion's step costs; and a parameter goes to the
buffer of the optimizer that steps it.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
from megatron.core.optimizer.optimizer import FP32Optimizer
from megatron.core.utils import get_pg_rank

from pion_dist import Pion, PionConfig, cost
from pion_dist.classify import Rotated, Scalar
from pion_dist.plan import deal, deal_shards

from . import seams
from .arguments import pion_config
from .parameters import decide, decided, noted
from .transformer_engine import is_fp8


def apply() -> None:
    """Patch the layer-wise optimizer, for ``--optimizer pion`` alone."""
    target: Any = LayerWiseDistributedOptimizer
    target.__init__ = _in_float32_and_empty_too(target.__init__)
    target._shard_params_ping_pong = _dealt_by_cost(target._shard_params_ping_pong)
    target._compute_per_buffer_param_layout = staticmethod(
        _shards_by_cost(target._compute_per_buffer_param_layout)
    )
    if seams.has_training():
        training: Any = importlib.import_module("megatron.training.training")
        training.tag_params_for_buffer_routing = _routed(training.tag_params_for_buffer_routing)


def _in_float32_and_empty_too(original: Any) -> Any:
    """Wrap the torch optimizers for float32 as Megatron does for bf16, and accept empty ones.

    Without an optimizer Megatron's class has no config; without a parameter on any rank its
    gathering of parameters fails.
    """

    @functools.wraps(original)
    def init(
        self: Any,
        optimizers: list[Any],
        config: Any,
        pg_collection: Any = None,
        init_state_fn_list: Any = None,
        model_chunks: Any = None,
    ) -> None:
        if config.optimizer == "pion" and not config.bf16:
            states = init_state_fn_list or [None] * len(optimizers)
            optimizers = [
                FP32Optimizer(optimizer, config, init_state)
                for optimizer, init_state in zip(optimizers, states, strict=True)
            ]
        original(self, optimizers, config, pg_collection, init_state_fn_list, model_chunks)
        if config.optimizer == "pion":
            self.config = config
            for name in ("dp_cp_params_list", "expt_dp_params_list"):
                if not any(getattr(self, name) or ()):
                    setattr(self, name, None)

    return init


def leave_out_empty(chain: Any) -> None:
    """Take layer-wise optimizers without a parameter in the whole run out (modified in place)."""
    if not isinstance(chain, LayerWiseDistributedOptimizer):
        chain.chained_optimizers = [
            each
            for each in chain.chained_optimizers
            if not isinstance(each, LayerWiseDistributedOptimizer) or each.chained_optimizers
        ]


def _dealt_by_cost(original: Any) -> Any:
    """Deal whole weights to ranks, where there is no buffer layout: Pion's by FLOP, Adam's by size.

    The same on every rank: it depends on shapes and their order alone.
    """

    @functools.wraps(original)
    def shard(self: Any, optimizers: list[Any], dp_cp_size: int, expt_dp_size: int) -> None:
        inner = [getattr(optimizer, "optimizer", optimizer) for optimizer in optimizers]
        if not any(isinstance(optimizer, Pion) for optimizer in inner):
            original(self, optimizers, dp_cp_size, expt_dp_size)
            return
        self.dp_cp_params_list = [[] for _ in range(dp_cp_size)]
        self.expt_dp_params_list = [[] for _ in range(expt_dp_size)]
        for optimizer in inner:
            for expert, everyone, group in (
                (False, self.dp_cp_params_list, self.pg_collection.dp_cp),
                (True, self.expt_dp_params_list, self.pg_collection.expt_dp),
            ):
                groups = [g for g in optimizer.param_groups if g["is_expert_parallel"] == expert]
                params = [p for g in groups for p in g["params"]]
                owners = deal([_cost(p, optimizer) for p in params], len(everyone))
                for p, owner in zip(params, owners, strict=True):
                    everyone[owner].append(p)
                if groups:
                    mine = set(everyone[get_pg_rank(group)])
                    for g in groups:
                        g["params"] = [p for p in g["params"] if p in mine]
        if expt_dp_size == 1:
            self.expt_dp_params_list = None

    return shard


def _cost(param: torch.Tensor, optimizer: torch.optim.Optimizer) -> float:
    if isinstance(optimizer, Pion):
        return weight_flop(param, optimizer.config)
    return float(param.numel())


def weight_flop(param: torch.Tensor, config: PionConfig) -> float:
    """FLOP of a step of a weight or shard, on average over the ranks that share its matrices."""
    _, decision = decided(param)
    assert isinstance(decision, Rotated)
    view, ranks = decision.view, decision.ranks
    return cost.weight_flop(view.whole_shapes(ranks).values(), config, view.axis, ranks=ranks)


def _shards_by_cost(original: Any) -> Any:
    """Give a bucket's costliest shards to the ranks that have least so far.

    Megatron fills the shards of a bucket by size, largest first, so the first ranks have the
    largest weights of every bucket: with Llama's shapes (1B, 8B, 70B) at DP 2 to 32 the costliest
    rank does 1.2 times the mean. Exchanging whole shards makes that 1.00 to 1.04 and pads nothing
    (1B at DP 32, with hardly a weight a rank: 1.32 to 1.23).
    Filling them by cost instead would gain no more and pad a tenth and more where ranks are many.
    """

    @functools.wraps(original)
    def layout(params: Any, bucket_size: Any, ranks: int, *args: Any, **kwargs: Any) -> Any:
        found = original(params, bucket_size, ranks, *args, **kwargs)
        if ranks > 1 and all(noted(p) for p in params):
            config = pion_config(importlib.import_module("megatron.training").get_args())
            balance(found, ranks, {p: weight_flop(p, config) for p in params})
        return found

    return layout


def balance(layout: Any, ranks: int, flop: dict[torch.Tensor, float]) -> None:
    """Reorder the shards of each bucket of a layout (modified in place).

    Args:
        layout: Megatron's PerBufferParamLayout.
        ranks: shards of a bucket.
        flop: what each parameter of the layout costs.
    """
    shards: dict[int, list[list[torch.Tensor]]] = {}
    sizes = [(end - start) // ranks for start, end in layout.bucket_indices]
    for p, (start, _, bucket) in layout.param_index_map.items():
        members = shards.setdefault(bucket, [[] for _ in range(ranks)])
        members[(start - layout.bucket_indices[bucket][0]) // sizes[bucket]].append(p)
    buckets = sorted(shards)
    dealt = deal_shards([[sum(flop[p] for p in shard) for shard in shards[b]] for b in buckets])
    for bucket, to in zip(buckets, dealt, strict=True):
        for shard, rank in enumerate(to):
            moved = (rank - shard) * sizes[bucket]
            for p in shards[bucket][shard]:
                start, end, _ = layout.param_index_map[p]
                layout.param_index_map[p] = (start + moved, end + moved, bucket)


def _routed(original: Any) -> Any:
    """Tag parameters for Pion's buffer or Adam's by the decision, before buffers are made."""

    @functools.wraps(original)
    def tag(model_chunks: Any) -> None:
        original(model_chunks)
        args = importlib.import_module("megatron.training").get_args()
        if args.optimizer == "pion":
            exclude = args.pion_exclude or ()
            for info, p, decision in decide(model_chunks, pion_config(args), exclude=exclude):
                if isinstance(decision, Scalar) and not getattr(p, "allreduce", True):
                    # Megatron's other distributed optimizer here has no group of expert ranks.
                    raise ValueError(
                        f"--optimizer pion with --use-distributed-optimizer: {info.name} is a "
                        f"routed expert's and Adam's ({decision.reason}), which needs "
                        "--no-use-layer-wise-param-layout"
                    )
                if isinstance(decision, Scalar) and is_fp8(p):
                    # Megatron groups the buckets of one buffer of FP8 weights at most.
                    raise ValueError(
                        f"--optimizer pion with --fp8-param-gather: {info.name} is kept in FP8 and "
                        f"Adam's ({decision.reason}): leave --fp8-param-gather out"
                    )
                p.is_managed_by_layer_wise_optimizer = isinstance(decision, Rotated)  # type: ignore[attr-defined]

    return tag
