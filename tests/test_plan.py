"""The plan: what it says of cut weights, and how evenly it deals them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pion_dist import PionConfig
from pion_dist.classify import ParamInfo, Scalar, classify
from pion_dist.plan import build_plan, deal


@given(st.lists(st.floats(1, 1e6), max_size=40), st.integers(1, 8))
def test_dealing_is_deterministic_and_even(costs: list[float], ranks: int) -> None:
    owners = deal(costs, ranks)
    assert owners == deal(list(costs), ranks)
    loads = [sum(c for c, o in zip(costs, owners, strict=True) if o == r) for r in range(ranks)]
    # Largest first never leaves a rank more than one item above another.
    assert max(loads, default=0) - min(loads) <= max(costs, default=0) * (1 + 1e-9)


def plan_of(info: ParamInfo, **options: str) -> object:
    config = PionConfig(**options)
    return build_plan([(info.name, info.shape, classify(info, config))], config)


@pytest.mark.parametrize("cut", ["rows", "cols"])
def test_a_cut_weight_costs_its_share_when_owned_and_all_when_duplicated(cut: str) -> None:
    shape, shard = (12, 8), (6, 8) if cut == "rows" else (12, 4)
    alone = plan_of(ParamInfo(name="w", shape=shape))
    info = ParamInfo(name="w", shape=shard, tp_cut=cut, tp_size=2)
    owned, duplicated = plan_of(info), plan_of(info, tp_mode="duplicated")
    assert owned.weights[0].matrices == alone.weights[0].matrices == (("whole", (1, 12, 8)),)
    assert owned.flop == alone.flop / 2 and owned.state_bytes == alone.state_bytes / 2
    assert duplicated.flop == alone.flop and duplicated.state_bytes == alone.state_bytes
    assert owned.adam_bytes == alone.adam_bytes / 2


def test_heads_are_dealt_and_not_cut() -> None:
    qkv = (("q", 4), ("k", 2), ("v", 2))
    info = ParamInfo(name="w", shape=(8, 5), qkv=qkv, head_dim=2, tp_cut="rows", tp_size=2)
    assert plan_of(info, qkv="head").weights[0].matrices == (("head", (4, 2, 5)),)
    assert plan_of(info, qkv="qkv").weights[0].matrices[0] == ("q", (1, 8, 5))


def test_what_cannot_be_cut_is_refused_unless_excluded() -> None:
    info = ParamInfo(name="linear_qkv.weight", shape=(8, 5), unsupported="too few query groups")
    with pytest.raises(ValueError, match="too few query groups"):
        classify(info, PionConfig())
    assert isinstance(classify(info, PionConfig(), exclude=["qkv"]), Scalar)


def test_a_gate_that_is_not_split_cannot_be_cut() -> None:
    info = ParamInfo(name="fc1", shape=(8, 5), gated=True, tp_cut="rows", tp_size=2)
    with pytest.raises(ValueError, match="--pion-no-split-gate"):
        classify(info, PionConfig(split_gate=False))
