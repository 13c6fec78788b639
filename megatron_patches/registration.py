"""Puts Pion into an unmodified Megatron: ``apply()`` patches every seam of ``seams``."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from . import seams

_applied = False


def apply() -> None:
    """Register ``--optimizer pion`` and its flags in the installed Megatron; once is enough.

    Call it before anything imports ``get_megatron_optimizer`` by name and before arguments are
    parsed.

    Raises:
        SeamError: this Megatron is missing, or lacks a place that Pion holds on to.
    """
    global _applied
    if _applied:
        return
    seams.check()
    from . import diagnostics, distributed_optimizer, optimizer_state, sharded_state
    from .arguments import add_pion_arguments, extend_config

    config_module = importlib.import_module("megatron.core.optimizer.optimizer_config")
    extend_config(config_module.OptimizerConfig)
    _register()
    sharded_state.apply()
    optimizer_state.apply()
    distributed_optimizer.apply()
    _use_compiled_helpers()
    core = importlib.import_module("megatron.core.optimizer")
    core.get_megatron_optimizer = _with_pion(core.get_megatron_optimizer)  # type: ignore[attr-defined]
    core._get_param_groups = _with_lr_mult(core._get_param_groups)  # type: ignore[attr-defined]
    core.get_mup_config_overrides = _mup_of_adam(core.get_mup_config_overrides)  # type: ignore[attr-defined]
    if seams.has_training():
        diagnostics.apply()
        training = importlib.import_module("megatron.training.training")
        training.get_megatron_optimizer = core.get_megatron_optimizer  # type: ignore[attr-defined]
        training.get_mup_config_overrides = core.get_mup_config_overrides  # type: ignore[attr-defined]
        arguments = importlib.import_module("megatron.training.arguments")
        add_megatron_arguments = arguments.add_megatron_arguments

        @functools.wraps(add_megatron_arguments)
        def with_pion(parser: Any) -> Any:
            return add_pion_arguments(add_megatron_arguments(parser))

        arguments.add_megatron_arguments = with_pion  # type: ignore[attr-defined]
    _applied = True


def _register() -> None:
    from megatron.core.optimizer.emerging_optimizers import (
        _EMERGING_OPTIMIZERS,
        EmergingOptimizerEntry,
    )

    from .sharded_state import CheckpointedPion

    _EMERGING_OPTIMIZERS["pion"] = EmergingOptimizerEntry(
        optimizer_cls=CheckpointedPion,
        init_state_fn=_state_exists,
        config_to_kwargs=_pion_kwargs,
        default_param_overrides={_not_pion(): {"optimizer": "adam"}},
    )


def _not_pion() -> Any:
    """Megatron's key of the parameters that are Adam's."""
    from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate

    from .parameters import is_scalar

    return ParamKey(predicate=ParamPredicate(name="not_pion", fn=is_scalar))


def _use_compiled_helpers() -> None:
    """Spare the wheel's Megatron its make: it ships the compiled dataset helpers and no Makefile.

    pretrain() calls make whatever is there (initialize_megatron), and ends when it fails.
    """
    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None:
        utils = importlib.import_module("megatron.core.datasets.utils")
        utils.compile_helpers = lambda: None  # type: ignore[attr-defined]


def _state_exists(optimizer: Any, config: Any = None) -> None:
    """Pion makes its state when it is made."""


def _pion_kwargs(config: Any, model_chunks: Sequence[Any], pg_collection: Any) -> dict[str, Any]:
    from pion_dist.classify import Rotated

    from . import teams
    from .arguments import pion_config
    from .parameters import decided, is_expert

    if pg_collection is None:
        from megatron.core.process_groups_config import ProcessGroupCollection

        pg_collection = ProcessGroupCollection.use_mpu_process_groups()
    views, names, shards = {}, {}, {}
    for p in (p for chunk in model_chunks for p in chunk.parameters() if p.requires_grad):
        info, decision = decided(p)
        if not isinstance(decision, Rotated):
            continue
        views[p], names[p] = decision.view, info.name
        if decision.ranks > 1 and not decision.of_whole:
            shards[p] = pg_collection.expt_tp if is_expert(info.name) else pg_collection.tp
    options, teams_of = pion_config(config), teams.Teams()
    if not config.use_distributed_optimizer:  # which has groups of its own
        for tp in (pg_collection.tp, getattr(pg_collection, "expt_tp", None)):
            if tp is not None and tp.size() > 1:
                teams_of |= teams.make([tp], options, tp, config.pion_timeout)
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


def _with_pion(original: Any) -> Any:
    """get_megatron_optimizer with --pion-init, the decisions, and the float32 masters."""

    @functools.wraps(original)
    def get_megatron_optimizer(
        config: Any, model_chunks: Sequence[Any], *args: Any, **kwargs: Any
    ) -> Any:
        if config.optimizer != "pion" and config.pion_init == "keep":
            return original(config, model_chunks, *args, **kwargs)
        from . import diagnostics, distributed_optimizer, optimizer_state, transformer_engine
        from .arguments import pion_config
        from .initialization import draw
        from .parameters import decide

        options = pion_config(config)
        if config.optimizer == "pion":
            _check_config(options, config, model_chunks)
        _compare_options(options, config)
        decisions = decide(model_chunks, options, exclude=config.pion_exclude or ())
        transformer_engine.check(model_chunks, decisions)
        if config.optimizer == "pion" and not config.use_distributed_optimizer:
            _refuse_split_groups(decisions)
        if config.optimizer == "pion":
            transformer_engine.refuse_unwritable(decisions, config)
        if config.pion_init != "keep":
            draw(
                model_chunks,
                decisions,
                options,
                kind=config.pion_init,
                scale=config.pion_init_scale,
                seed=config.pion_seed,
            )
        if config.optimizer != "pion":
            return original(config, model_chunks, *args, **kwargs)
        if config.use_distributed_optimizer:
            optimizer = distributed_optimizer.make(
                original,
                config,
                model_chunks,
                *args,
                kwargs_of=_pion_kwargs,
                not_pion=_not_pion(),
                **kwargs,
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


def _with_lr_mult(original: Any) -> Any:
    """_get_param_groups with --pion-lr-mult, on top of what overrides say of a group."""
    from .distributed_optimizer import WITH_PION

    @functools.wraps(original)
    def get_param_groups(model_chunks: Any, config: Any, config_overrides: Any) -> Any:
        groups = original(model_chunks, config, config_overrides)
        with_pion = config.optimizer == "pion" or getattr(config, WITH_PION, False)
        if not with_pion or config.pion_lr_mult == 1.0:
            return groups
        pions = [group for group in groups if group.get("optimizer", "pion") == "pion"]
        others = [group for group in groups if group.get("optimizer", "pion") != "pion"]
        for group in pions:
            # Megatron logs the first default group's rate: Adam's, where Adam has such a group.
            group["default_config"] &= not any(other["default_config"] for other in others)
            for key in ("max_lr", "min_lr"):
                if group[key] is not None:
                    group[key] *= config.pion_lr_mult
        return groups

    return get_param_groups


def _mup_of_adam(original: Any) -> Any:
    """get_mup_config_overrides: Adam's under ``--optimizer adam``, for what is not Pion's.

    Pion's steps have one root mean square at every width, and so a spectral norm that grows with
    the root of the width, which muP wants to be the same (https://arxiv.org/abs/2310.17813).
    """
    from megatron.core.optimizer.optimizer_config import (
        ParamKey,
        ParamPredicate,
        ParamWithNamePredicate,
    )

    from .parameters import is_scalar

    def of_adam(key: ParamKey) -> ParamKey:
        # Evaluated in get_megatron_optimizer, when it is decided.
        predicate = ParamWithNamePredicate(
            name=f"{key.with_name_predicate.name}_not_pion",  # its hash
            fn=lambda p, name: is_scalar(p) and key.matches(p, name),
        )
        return ParamKey(with_name_predicate=predicate)

    @functools.wraps(original)
    def get_mup_config_overrides(
        config: Any, mup_width_mult: float, optimizer_type: str = "adam"
    ) -> Any:
        if optimizer_type != "pion":
            return original(config, mup_width_mult, optimizer_type)
        overrides = original(config, mup_width_mult, "adam")
        with_pion = {of_adam(key): override for key, override in overrides.items()}
        if mup_width_mult != 1.0:
            factor = mup_width_mult**-0.5
            rates = {
                key: factor * rate
                for key, rate in (("max_lr", config.lr), ("min_lr", config.min_lr))
                if rate is not None
            }
            pions = ParamPredicate(name="pion_mup", fn=lambda p: not is_scalar(p))
            with_pion[ParamKey(predicate=pions)] = rates
        return with_pion

    return get_mup_config_overrides


def _check_config(options: Any, config: Any, model_chunks: Sequence[Any]) -> None:
    """Repeat the argument checks for configs that are built in code."""
    from pion_dist import RECIPES, PionConfig

    from .arguments import UNSUPPORTED

    if unsupported := [option for option in UNSUPPORTED if getattr(config, option, False)]:
        raise ValueError(f"optimizer='pion' does not support {unsupported[0]}=True")
    name = config.pion_recipe
    # These follow bf16 by themselves.
    given = dataclasses.replace(options, matmul_precision="highest", state_dtype="fp32")
    if given == PionConfig() != RECIPES[name]:
        raise ValueError(
            f"pion_recipe={name!r} alone sets nothing in a config: "
            f"OptimizerConfig(**megatron_patches.recipe({name!r}), ...)"
        )
    if config.use_layer_wise_distributed_optimizer:
        raise ValueError(
            "optimizer='pion' with use_layer_wise_distributed_optimizer=True: set it to False, and "
            "use_distributed_optimizer=True here and in DistributedDataParallelConfig"
        )
    ddp = (getattr(chunk, "ddp_config", None) for chunk in model_chunks)
    sharded = any(getattr(each, "use_distributed_optimizer", False) for each in ddp)
    if sharded != config.use_distributed_optimizer:
        raise ValueError(
            f"optimizer='pion' with use_distributed_optimizer={config.use_distributed_optimizer} "
            f"and {sharded} in DistributedDataParallelConfig: set both alike"
        )


def _refuse_split_groups(decisions: Sequence[Any]) -> None:
    """Refuse weights of whose matrices no rank has a shard: only ranges are joined by place.

    Raises:
        ValueError: says what to set.
    """
    from pion_dist.classify import Rotated

    for info, _, decision in decisions:
        if isinstance(decision, Rotated) and decision.of_whole:
            raise ValueError(
                f"{info.name}: --num-query-groups is below --tensor-model-parallel-size, so a rank "
                "has a part of a query group. Set --use-distributed-optimizer, or leave the weight "
                "to Adam with --pion-exclude linear_qkv"
            )


def _compare_options(options: Any, config: Any) -> None:
    """Stop every rank if one was started with other options (pipeline stages share no plan)."""
    from pion_dist.exchange import compare

    world = torch.distributed.group.WORLD if torch.distributed.is_initialized() else None
    if world is None:
        return
    lines = _option_lines(options, config)
    compare("\n".join(lines), lines, group=world, what="Pion's options")


def _option_lines(options: Any, config: Any) -> list[str]:
    """Everything that a run was told, an option a line."""
    others = ["exclude", "init", "init_scale", "lr_mult"]
    if config.pion_spectrum_interval:  # whose reports are collectives
        others += ["spectrum_interval", "spectrum_exact"]
    return [*options.lines(), *(f"{name}={getattr(config, f'pion_{name}')!r}" for name in others)]


def _adopt_masters(optimizer: Any) -> None:
    """Tell every Pion which float32 master stands for which of its weights, and which are left."""
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

    from pion_dist import Pion

    from .distributed_optimizer import leaves

    for each in leaves(optimizer):
        if isinstance(each.optimizer, Pion):
            masters = {}
            if isinstance(each, Float16OptimizerWithFloat16Params):
                pairs = zip(each.float16_groups, each.fp32_from_float16_groups, strict=True)
                masters = {w: master for group in pairs for w, master in zip(*group, strict=True)}
            each.optimizer.adopt(masters)


def _print_plan(decisions: Sequence[Any], optimizer: Any, options: str) -> None:
    """Print the whole model's plan on the first rank: the parameters of all pipeline stages."""
    from pion_dist.classify import Scalar, table

    from .distributed_optimizer import pions
    from .parameters import of_all_ranks

    totals = [f"Pion: {pion.totals()}" for pion in pions(optimizer)]
    others = sum(isinstance(decision, Scalar) for _, _, decision in decisions)
    rows = table([(info.name, info.shape, decision) for info, _, decision in decisions])
    mine = (rows, "; ".join([*totals, f"Adam: {others} parameters"]))
    everyone = of_all_ranks(mine)
    if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return
    print("Pion's plan", flush=True)
    print("  " + options)
    for row in dict.fromkeys(row for rows, _ in everyone for row in rows):
        print("  " + row)
    for line, ranks in _ranks_by(line for _, line in everyone).items():
        print(f"  rank {ranks}: {line}" if len(everyone) > 1 else f"  {line}", flush=True)


def _ranks_by(totals: Iterator[str]) -> dict[str, str]:
    by_line: dict[str, list[str]] = {}
    for rank, line in enumerate(totals):
        by_line.setdefault(line, []).append(str(rank))
    return {line: ", ".join(ranks) for line, ranks in by_line.items()}
