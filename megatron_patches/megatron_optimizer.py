"""Megatron's get_megatron_optimizer with ``--optimizer pion``."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from megatron.core.process_groups_config import ProcessGroupCollection

from pion_dist import Pion, PionConfig
from pion_dist.classify import Rotated, Scalar, table
from pion_dist.exchange import compare

from . import diagnostics, distributed_optimizer, optimizer_state, transformer_engine
from .arguments import pion_config
from .distributed_optimizer import leaves, pions
from .initialization import draw
from .parameters import Decisions, decide, decided, is_expert
from .parser import check_config
from .process_groups import Teams, make_teams, of_all_ranks, rank


def with_pion(original: Any) -> Any:
    """get_megatron_optimizer with --pion-init, the decisions, and the float32 masters."""

    @functools.wraps(original)
    def get_megatron_optimizer(
        config: Any, model_chunks: Sequence[Any], *args: Any, **kwargs: Any
    ) -> Any:
        if config.optimizer != "pion" and config.pion_init == "keep":
            return original(config, model_chunks, *args, **kwargs)
        options = pion_config(config)
        decisions = _decide(options, config, model_chunks)
        if config.optimizer != "pion":
            return original(config, model_chunks, *args, **kwargs)
        if config.use_distributed_optimizer:
            optimizer = distributed_optimizer.make(
                original, config, model_chunks, *args, kwargs_of=pion_kwargs, **kwargs
            )
        else:
            optimizer = original(config, model_chunks, *args, **kwargs)
            _adopt_masters(optimizer)
        optimizer_state.attach(optimizer, config)
        diagnostics.attach(optimizer, config)
        if config.pion_print_plan:
            lines = _option_lines(options, config)
            _print_plan(decisions, optimizer, f"recipe {config.pion_recipe}: {', '.join(lines)}")
        return optimizer

    return get_megatron_optimizer


def _decide(options: PionConfig, config: Any, model_chunks: Sequence[Any]) -> Decisions:
    """Decide which parameters are Pion's, refuse what cannot be trained, draw initial weights."""
    if config.optimizer == "pion":
        check_config(options, config, model_chunks)
    _compare_options(options, config)
    decisions = decide(model_chunks, options, exclude=config.pion_exclude or ())
    transformer_engine.check(model_chunks, decisions)
    if config.optimizer == "pion" and not config.use_distributed_optimizer:
        refuse_without_ranges(decisions)
    if config.pion_init != "keep":
        draw(
            model_chunks,
            decisions,
            options,
            kind=config.pion_init,
            scale=config.pion_init_scale,
            seed=config.pion_seed,
        )
    return decisions


def refuse_without_ranges(decisions: Decisions) -> None:
    """Refuse weights that only ``--use-distributed-optimizer`` can train: it stores ranges of them.

    Raises:
        ValueError: names the first such weight, and says what to set.
    """
    for info, p, decision in decisions:
        if not isinstance(decision, Rotated):
            continue
        if decision.of_whole:  # no rank has a shard of its matrices
            raise ValueError(
                f"{info.name}: --num-query-groups is below --tensor-model-parallel-size, so a rank "
                "has a part of a query group. Set --use-distributed-optimizer, or leave the weight "
                "to Adam with --pion-exclude linear_qkv"
            )
        if transformer_engine.is_fp8(p):  # which only DistributedOptimizer writes
            raise ValueError(
                f"{info.name} is kept as {type(p).__name__} (--fp8-param-gather), which "
                "--optimizer pion supports with --use-distributed-optimizer: set it, or leave "
                "--fp8-param-gather out"
            )


def _compare_options(options: Any, config: Any) -> None:
    """Stop every rank if one was started with other options (pipeline stages share no plan)."""
    world = torch.distributed.group.WORLD if torch.distributed.is_initialized() else None
    if world is not None:
        lines = _option_lines(options, config)
        compare("\n".join(lines), lines, group=world, what="Pion's options")


def _option_lines(options: Any, config: Any) -> list[str]:
    """Everything that a run was told, an option a line."""
    others = ["exclude", "init", "init_scale", "lr_mult"]
    if config.pion_spectrum_interval:  # whose reports are collectives
        others += ["spectrum_interval", "spectrum_exact"]
    return [*options.lines(), *(f"{name}={getattr(config, f'pion_{name}')!r}" for name in others)]


def pion_kwargs(config: Any, model_chunks: Sequence[Any], pg_collection: Any) -> dict[str, Any]:
    """Arguments of CheckpointedPion; a collective of all ranks."""
    if pg_collection is None:
        pg_collection = ProcessGroupCollection.use_mpu_process_groups()
    views, names, shards = {}, {}, {}
    for p in (p for chunk in model_chunks for p in chunk.parameters() if p.requires_grad):
        info, decision = decided(p)
        if not isinstance(decision, Rotated):
            continue
        views[p], names[p] = decision.view, info.name
        if decision.ranks > 1 and not decision.of_whole:
            shards[p] = pg_collection.expt_tp if is_expert(info.name) else pg_collection.tp
    options, teams_of = pion_config(config), Teams()
    if not config.use_distributed_optimizer:  # which has groups of its own
        for tp in (pg_collection.tp, getattr(pg_collection, "expt_tp", None)):
            if tp is not None and tp.size() > 1:
                teams_of |= make_teams([tp], options, tp, config.pion_timeout)
    # Where a script leaves the rate to its scheduler there is none to begin with.
    lr = {} if config.lr is None else {"lr": config.lr * config.pion_lr_mult}
    return {
        **lr,
        "config": options,
        "views": views,
        "names": names,
        "shards": shards,
        "teams": teams_of,
    }


def _adopt_masters(optimizer: Any) -> None:
    """Tell every Pion which float32 master stands for which of its weights, and which are left."""
    for each in leaves(optimizer):
        if isinstance(each.optimizer, Pion):
            masters = {}
            if isinstance(each, Float16OptimizerWithFloat16Params):
                pairs = zip(each.float16_groups, each.fp32_from_float16_groups, strict=True)
                masters = {w: master for group in pairs for w, master in zip(*group, strict=True)}
            each.optimizer.adopt(masters)


def _print_plan(decisions: Sequence[Any], optimizer: Any, options: str) -> None:
    """Print the whole model's plan on the first rank: the parameters of all pipeline stages."""
    totals = [f"Pion: {pion.totals()}" for pion in pions(optimizer)]
    others = sum(isinstance(decision, Scalar) for _, _, decision in decisions)
    rows = table([(info.name, info.shape, decision) for info, _, decision in decisions])
    mine = (rows, "; ".join([*totals, f"Adam: {others} parameters"]))
    everyone = of_all_ranks(mine)
    if rank() != 0:
        return
    print("Pion's plan", flush=True)
    print("  " + options)
    for row in dict.fromkeys(row for rows, _ in everyone for row in rows):
        print("  " + row)
    ranks_by: dict[str, list[str]] = {}
    for number, (_, line) in enumerate(everyone):
        ranks_by.setdefault(line, []).append(str(number))
    for line, ranks in ranks_by.items():
        where = f"rank {', '.join(ranks)}: " if len(everyone) > 1 else ""
        print(f"  {where}{line}", flush=True)
