"""A recipe sets exactly its options, and a flag that is given wins over it."""

import argparse
import ast
import inspect
from dataclasses import fields

import pytest

from megatron_patches.arguments import (
    INIT_OF_RECIPE,
    pion_config,
    recipe_values,
)
from megatron_patches.parser import add_pion_arguments
from pion_dist import RECIPES, PionConfig, recipes
from pion_dist.recipes import in_bf16


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    """With the flags of Megatron's that Pion's are checked against.

    Megatron's own parser is used in megatron_checks.py.
    """
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--optimizer", choices=["adam"], default="pion")
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--lr-warmup-init", type=float, default=0.0)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1)
    return add_pion_arguments(parser)


def test_published_recipes_name_every_option() -> None:
    """Else a change of PionConfig's defaults would change them; the others follow the defaults."""
    tree = ast.parse(inspect.getsource(recipes))
    options = {field.name for field in fields(PionConfig)}
    complete = {
        ast.unparse(node.targets[0])
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Call)
        and {option.arg for option in node.value.keywords} == options
    }
    table = next(node for node in ast.walk(tree) if isinstance(node, ast.Dict))
    for name, recipe in zip(RECIPES, table.values, strict=True):
        if name.startswith("paper"):
            base = recipe.args[0] if isinstance(recipe, ast.Call) else recipe
            assert ast.unparse(base) in complete, name


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_gives_its_options(parser: argparse.ArgumentParser, name: str) -> None:
    args = parser.parse_args(["--pion-recipe", name])
    assert pion_config(args) == RECIPES[name]
    assert args.pion_init == INIT_OF_RECIPE[name]


@pytest.mark.parametrize("name", RECIPES)
def test_in_bf16_our_own_recipes_have_bf16_products_and_averages(
    parser: argparse.ArgumentParser, name: str
) -> None:
    args = parser.parse_args(["--pion-recipe", name, "--bf16"])
    assert pion_config(args) == in_bf16(name)
    published = name.startswith("paper")
    assert args.pion_matmul_precision == ("highest" if published else "bf16")
    in_float32 = ["--pion-matmul-precision", "highest", "--pion-state-dtype", "fp32"]
    given = parser.parse_args([*in_float32, "--bf16"])
    assert pion_config(given) == RECIPES["pretrain"]


# Flags that set what no recipe has; together every field that a recipe gives a default.
GIVEN = {
    "--pion-momentum ambient": {"pion_momentum": "ambient"},
    "--pion-direction msign": {"pion_direction": "msign"},
    "--pion-nesterov": {"pion_nesterov": True},
    "--pion-beta1 0.5": {"pion_beta1": 0.5},
    "--pion-beta2 0.5": {"pion_beta2": 0.5},
    "--pion-eps 1e-3": {"pion_eps": 1e-3},
    "--pion-side out": {"pion_side": "out"},
    "--pion-scaling none": {"pion_scaling": "none"},
    "--pion-rms 0.5": {"pion_rms": 0.5},
    "--pion-retraction cayley": {"pion_retraction": "cayley"},
    "--pion-degree 4": {"pion_degree": 4},
    "--pion-qkv whole": {"pion_qkv": "whole"},
    "--pion-no-split-gate": {"pion_split_gate": False},
    "--pion-matmul-precision bf16": {"pion_matmul_precision": "bf16"},
    "--pion-state-layout dense": {"pion_state_layout": "dense"},
    "--pion-state-dtype bf16": {"pion_state_dtype": "bf16"},
    "--pion-offload-state": {"pion_offload_state": True},
    "--pion-team-size 2": {"pion_team_size": 2},
    "--pion-blocks 2": {"pion_blocks": 2},
    "--pion-spectrum-reset-interval 5": {"pion_spectrum_reset_interval": 5},
    "--pion-init spectral": {"pion_init": "spectral"},
}


@pytest.mark.parametrize("flags", GIVEN)
def test_a_given_flag_wins_before_the_recipe_and_after_it(
    parser: argparse.ArgumentParser, flags: str
) -> None:
    recipe = ["--pion-recipe", "paper-60m"]
    plain = vars(parser.parse_args(recipe))
    assert plain != plain | GIVEN[flags]
    assert vars(parser.parse_args([*flags.split(), *recipe])) == plain | GIVEN[flags]
    assert vars(parser.parse_args([*recipe, *flags.split()])) == plain | GIVEN[flags]


def test_every_field_of_a_recipe_is_tried() -> None:
    assert {field for fields in GIVEN.values() for field in fields} == set(
        recipe_values("paper-rl")
    )


def test_nesterov_can_be_taken_off(parser: argparse.ArgumentParser) -> None:
    assert parser.parse_args([]).pion_nesterov is True
    assert parser.parse_args(["--no-pion-nesterov"]).pion_nesterov is False


@pytest.mark.parametrize(
    ("flags", "init"),
    [
        ("", "fan_in"),
        ("--pion-recipe finetune", "keep"),
        ("--optimizer adam", "keep"),
        ("--optimizer adam --pion-recipe pretrain", "keep"),
        ("--optimizer adam --pion-init orthogonal", "orthogonal"),
    ],
)
def test_the_initial_weights_are_redrawn_for_pion_from_scratch(
    parser: argparse.ArgumentParser, flags: str, init: str
) -> None:
    assert parser.parse_args(flags.split()).pion_init == init


def test_one_parse_leaves_nothing_to_the_next(
    parser: argparse.ArgumentParser, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--pion-recipe", "paper-60m", "--pion-rms", "0.5"]
    monkeypatch.setattr("sys.argv", ["script", *flags])  # Megatron parses sys.argv
    from_argv = parser.parse_args()
    assert vars(from_argv) == vars(parser.parse_args(flags))
    assert pion_config(from_argv) != RECIPES["paper-60m"]
    assert pion_config(parser.parse_args(flags[:2])) == RECIPES["paper-60m"]
    assert pion_config(parser.parse_args([])) == RECIPES["pretrain"]


def test_an_unknown_recipe_is_refused_with_the_known_ones(
    parser: argparse.ArgumentParser, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parser.parse_args(["--pion-recipe", "paper"])
    said = capsys.readouterr().err.splitlines()[-1]
    assert "--pion-recipe" in said and all(name in said for name in RECIPES)
