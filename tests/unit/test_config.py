"""PionConfig refuses what is unknown or contradictory, and says what is allowed."""

import dataclasses

import pytest

from pion_dist import RECIPES, PionConfig
from pion_dist.config import choices


@pytest.mark.parametrize("option", choices())
def test_unknown_values_are_refused_with_the_allowed_ones(option: str) -> None:
    with pytest.raises(ValueError) as refusal:
        PionConfig(**{option: "no such value"})
    assert option in str(refusal.value)
    assert all(repr(value) in str(refusal.value) for value in choices()[option])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"betas": (-0.1, 0.9)}, "betas"),
        ({"eps": 0.0}, "eps"),
        ({"rms": float("nan")}, "rms"),
        ({"degree": 1}, "degree"),
        ({"degree": 2.0}, "degree"),
        ({"nesterov": 1}, "nesterov"),
        ({"direction": "momentum", "retraction": "exp", "degree": 3}, "retraction='exp'"),
        ({"direction": "momentum", "scaling": "none", "rms": 0.1}, "scaling='none'"),
    ],
    ids=str,
)
def test_bad_numbers_and_contradictions_are_refused(options: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        PionConfig(**options)


def test_is_frozen_and_keyword_only() -> None:
    with pytest.raises(TypeError):
        PionConfig("lie")  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        PionConfig().rms = 0.1  # type: ignore[misc]


def test_the_defaults_are_what_the_documentation_says() -> None:
    assert dataclasses.asdict(PionConfig()) == {
        "momentum": "lie",
        "direction": "polar",
        "nesterov": True,
        "betas": (0.95, 0.95),
        "eps": 1e-8,
        "side": "both",
        "scaling": "rms",
        "rms": 0.2,
        "retraction": "taylor",
        "degree": 2,
        "qkv": "qkv",
        "split_gate": True,
        "matmul_precision": "highest",
        "state_layout": "packed",
        "state_dtype": "fp32",
        "offload_state": False,
        "team_size": "auto",
        "blocks": 1,
        "spectrum_reset_interval": 0,
    }


PAPER_1_3B = {
    "momentum": "lie",
    "direction": "momentum",
    "nesterov": False,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "side": "both",
    "scaling": "rms",
    "rms": 0.2,
    "retraction": "taylor",
    "degree": 2,
    "qkv": "qkv",
    "split_gate": True,
    "matmul_precision": "highest",
    "state_layout": "packed",
    "state_dtype": "fp32",
    "offload_state": False,
    "team_size": "auto",
    "blocks": 1,
    "spectrum_reset_interval": 0,
}


@pytest.mark.parametrize(
    ("recipe", "own"),
    [
        ("paper-1.3b", {}),
        ("paper-rl", {"side": "alternate"}),
        (
            "paper-60m",
            {"momentum": "transported", "betas": (0.9, 0.95), "side": "alternate", "qkv": "head"},
        ),
    ],
)
def test_the_published_recipes_never_change(recipe: str, own: dict) -> None:
    assert dataclasses.asdict(RECIPES[recipe]) == PAPER_1_3B | own


def test_alternate_begins_with_the_in_side() -> None:
    config = PionConfig(direction="momentum", side="alternate")
    assert [config.active_sides(step) for step in (1, 2, 3)] == [("in",), ("out",), ("in",)]
