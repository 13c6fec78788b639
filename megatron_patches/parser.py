"""Megatron's parser with the ``--pion-*`` flags, and refusals: of flags, and of configs."""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

from pion_dist import RECIPES, PionConfig

from .arguments import (
    CARRIED,
    DEFAULT_RECIPE,
    FLAGS,
    FOLLOWING,
    UNSUPPORTED,
    Flag,
    followed,
    follows,
    pion_config,
    recipe_values,
)


def add_pion_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags to Megatron's parser, and ``pion`` to its optimizers (modified in place).

    Raises:
        RuntimeError: the parser has no ``--optimizer`` with choices.
    """
    actions = [a for a in parser._actions if "--optimizer" in a.option_strings]
    if not actions or actions[0].choices is None:
        raise RuntimeError("Megatron's parser has no --optimizer with choices: pion_dist needs it")
    if "pion" in actions[0].choices:
        return parser
    actions[0].choices = [*actions[0].choices, "pion"]
    group = parser.add_argument_group(
        "pion",
        "W <- R W P with orthogonal R and P: singular values stay. The step is scaled by --lr and "
        "its schedule; --weight-decay does not touch Pion's matrices (it would change their "
        "spectrum), only Adam's parameters.",
    )
    from_recipe = recipe_values(DEFAULT_RECIPE)
    for flag in FLAGS:
        # What is not given is not set, so that parsing can tell it from what is.
        group.add_argument(
            f"--pion-{flag.name}",
            dest=flag.field,
            default=argparse.SUPPRESS if flag.field in from_recipe else flag.default,
            help=(flag.help + _default_of(flag)).replace("%", "%%"),
            **flag.options,
        )
    _mend_help(parser)
    parse_known_args = parser.parse_known_args

    def parse_and_check(*args: Any, **kwargs: Any) -> tuple[argparse.Namespace, list[str]]:
        namespace, rest = parse_known_args(*args, **kwargs)
        values = recipe_values(namespace.pion_recipe)
        if namespace.optimizer != "pion":
            values["pion_init"] = "keep"  # an init is for all optimizers, a recipe for Pion
        for field, value in values.items():
            if not hasattr(namespace, field):
                setattr(namespace, field, value)
        namespace.__dict__.update({f"pion_{x}": followed(namespace, x) for x in FOLLOWING})
        for field, argument, default in CARRIED:
            setattr(namespace, field, getattr(namespace, argument, default))
        try:
            check(namespace)
        except ValueError as error:
            parser.error(str(error))
        return namespace, rest

    parser.parse_known_args = parse_and_check  # type: ignore[method-assign,assignment]
    return parser


def _default_of(flag: Flag) -> str:
    if flag.options.get("action") in ("store_true", "store_false", "append"):
        return ""
    if flag.field in recipe_values(DEFAULT_RECIPE):
        value = recipe_values(DEFAULT_RECIPE)[flag.field]
        value = follows(flag.field.removeprefix("pion_")) if value is None else value
        return f" Default: the recipe's; that of {DEFAULT_RECIPE} is {value}."
    return f" Default: {flag.default}."


def _mend_help(parser: argparse.ArgumentParser) -> None:
    """Escape a bare per cent sign in help texts (modified in place), without which --help fails.

    Megatron 0.19.2 has one, in --moe-paged-stash-buffer-size-factor-cuda.
    """
    for action in parser._actions:
        try:
            _ = (action.help or "") % {**vars(action), "prog": parser.prog}
        except ValueError:
            action.help = (action.help or "").replace("%", "%%")


def check(args: argparse.Namespace) -> None:
    """Refuse contradictory values and combinations that Pion cannot train.

    Raises:
        ValueError: says which flag to change.
    """
    for pattern in args.pion_exclude or ():
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"--pion-exclude {pattern!r} is no regular expression: {error}"
            ) from None
    _check_positive(args, "init-scale")
    if args.pion_init == "keep" and args.pion_init_scale != 1.0:
        raise ValueError(
            f"--pion-init-scale {args.pion_init_scale} has nothing to scale with --pion-init keep: "
            "leave it out or set --pion-init"
        )
    if args.optimizer != "pion":
        return
    pion_config(args)
    _check_spectrum(args)
    _check_unsupported(args)
    _check_lr_mult(args)
    if args.pion_blocks > 1 and args.pion_blocks % args.tensor_model_parallel_size:
        raise ValueError(
            f"--pion-blocks {args.pion_blocks} must be a multiple of "
            f"--tensor-model-parallel-size {args.tensor_model_parallel_size}"
        )
    if getattr(args, "use_distributed_optimizer", False):
        if (args.save or args.load) and args.ckpt_format != "torch_dist":
            raise ValueError(
                "--optimizer pion with --use-distributed-optimizer needs --ckpt-format torch_dist"
            )
    elif getattr(args, "fp8_param_gather", False):
        raise ValueError(
            "--optimizer pion with --fp8-param-gather needs --use-distributed-optimizer: set it"
        )


def _check_unsupported(args: argparse.Namespace) -> None:
    """Refuse what Pion cannot train with."""
    for option, instead in UNSUPPORTED.items():
        if getattr(args, option, False):
            flag, other = (f"--{name.replace('_', '-')}" for name in (option, instead))
            then = f"use {other}" if instead else "leave it out"
            raise ValueError(f"--optimizer pion does not support {flag}: {then}")
    if args.pion_offload_state and getattr(args, "async_save", False):
        raise ValueError(
            "--async-save writes moments in the background, and with --pion-offload-state the next "
            "step changes them: leave one out"
        )


def _check_spectrum(args: argparse.Namespace) -> None:
    """Demand an interval that can be, and one where there is something to report exactly."""
    if args.pion_spectrum_interval < 0:
        raise ValueError(
            f"--pion-spectrum-interval {args.pion_spectrum_interval}: must be a number of "
            "iterations, or 0 for never"
        )
    if args.pion_spectrum_exact and not args.pion_spectrum_interval:
        raise ValueError("--pion-spectrum-exact needs --pion-spectrum-interval: set it too")


def _check_lr_mult(args: argparse.Namespace) -> None:
    """Demand a factor that leaves Pion's warm-up a rise, as Megatron demands it of ``--lr``."""
    _check_positive(args, "lr-mult")
    if args.lr is not None and args.lr_warmup_init > args.lr * args.pion_lr_mult:
        raise ValueError(
            f"--pion-lr-mult {args.pion_lr_mult} puts Pion's learning rate, "
            f"{args.lr * args.pion_lr_mult}, below --lr-warmup-init {args.lr_warmup_init}: lower it"
        )


def _check_positive(args: argparse.Namespace, name: str) -> None:
    value = getattr(args, "pion_" + name.replace("-", "_"))
    if not (math.isfinite(value) and value > 0.0):
        raise ValueError(f"--pion-{name} {value}: must be a positive number")


def check_config(options: PionConfig, config: Any, model_chunks: Sequence[Any]) -> None:
    """Refuse configs, built in code, that Pion cannot train with.

    Raises:
        ValueError: says what to set.
    """
    ddp = [x for chunk in model_chunks if (x := getattr(chunk, "ddp_config", None)) is not None]
    for option, instead in UNSUPPORTED.items():
        if any(getattr(each, option, False) for each in (config, *ddp)):
            then = f"set {instead}" if instead else "set it to False"
            raise ValueError(f"optimizer='pion' does not support {option}=True: {then}")
    name = config.pion_recipe
    if name not in RECIPES:
        raise ValueError(f"pion_recipe={name!r}: must be one of {', '.join(map(repr, RECIPES))}")
    default, given, recipe = (
        {option: x for option, x in dataclasses.asdict(each).items() if option not in FOLLOWING}
        for each in (PionConfig(), options, RECIPES[name])
    )
    sets = [option for option, value in recipe.items() if value != default[option]]
    if sets and all(given[option] == default[option] for option in sets):
        raise ValueError(
            f"pion_recipe={name!r} alone sets nothing in a config: "
            f"OptimizerConfig(**megatron_patches.recipe({name!r}), ...)"
        )
    if config.use_layer_wise_distributed_optimizer:
        raise ValueError(
            "optimizer='pion' with use_layer_wise_distributed_optimizer=True: set it to False, and "
            "use_distributed_optimizer=True here and in DistributedDataParallelConfig"
        )
    sharded = any(getattr(each, "use_distributed_optimizer", False) for each in ddp)
    if sharded != config.use_distributed_optimizer:
        raise ValueError(
            f"optimizer='pion' with use_distributed_optimizer={config.use_distributed_optimizer} "
            f"and {sharded} in DistributedDataParallelConfig: set both alike"
        )
