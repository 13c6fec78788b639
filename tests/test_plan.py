"""The plan: who has and does what, what moves, and how evenly it is dealt."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import MSIGN, PUBLISHED

from pion_dist import PionConfig
from pion_dist.classify import ParamInfo, Scalar, classify
from pion_dist.config import Axis
from pion_dist.cost import step_flop
from pion_dist.plan import WAVES, MatrixPlan, StepPlan, build_plan, deal, differences
from pion_dist.state import moments, unfit


@given(st.lists(st.floats(1, 1e6), max_size=40), st.integers(1, 8))
def test_dealing_is_deterministic_and_even(costs: list[float], ranks: int) -> None:
    teams = [[(rank,) for rank in range(ranks)]] * len(costs)
    owners = deal(costs, teams, ranks)
    assert owners == deal(list(costs), teams, ranks)
    loads = [sum(c for c, o in zip(costs, owners, strict=True) if o == r) for r in range(ranks)]
    # Largest first never leaves a rank more than one item above another.
    assert max(loads, default=0) - min(loads) <= max(costs, default=0) * (1 + 1e-9)


def plan_of(ranks: int, *, cut: int = 0, **options: object) -> StepPlan:
    """Four weights that ``ranks`` ranks share, both axes, and one that each has whole.

    They have a shard each, or there are ``cut`` shards.
    """
    shapes = [(12, 8, "rows"), (8, 12, "cols"), (8, 8, "rows"), (12, 8, "rows")]
    matrices = [
        MatrixPlan(
            weight=f"w{i}", part="whole", batch=1, m=m, n=n, axis=axis, group=0, cut=cut or ranks
        )
        for i, (m, n, axis) in enumerate(shapes)
    ]
    alone = MatrixPlan(weight="alone", part="whole", batch=2, m=4, n=6)
    return build_plan([*matrices, alone], [ranks], PionConfig(**options))


@pytest.mark.parametrize("options", [{}, MSIGN, PUBLISHED], ids=["default", "msign", "published"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_owners_share_the_work_and_the_state(ranks: int, options: dict[str, object]) -> None:
    plan, alone = plan_of(ranks, **options), plan_of(1, **options)
    repeated = plan.matrices[-1]
    once = repeated.batch * step_flop(repeated.m, repeated.n, plan.config)
    flop = [plan.flop([rank]) - once for rank in range(ranks)]
    assert sum(flop) == pytest.approx(alone.flop([0]) - once)
    state = [plan.state_bytes([rank]) for rank in range(ranks)]
    kept = sum(x.nbytes(4) for x in moments(2, 4, 6, plan.config, None).values())
    assert sum(state) - ranks * kept == alone.state_bytes([0]) - kept


@pytest.mark.parametrize(
    "options",
    [{}, MSIGN, PUBLISHED | {"state_layout": "dense"}],  # as rows of a triangle would be
    ids=["default", "msign", "published"],
)
def test_divided_state_is_a_share(options: dict[str, object]) -> None:
    plan, alone = plan_of(2, tp_mode="distributed", **options), plan_of(1, **options)
    kept = sum(x.nbytes(4) for x in moments(2, 4, 6, plan.config, None).values())
    for x in plan.matrices:
        if len(x.team) > 1:  # every rank has all of the smaller factor and of Σ
            found = moments(x.batch, x.m, x.n, plan.config, x.axis)
            kept += sum(moment.nbytes(4) for moment in found.values() if moment.dim is None)
    assert 2 * (plan.state_bytes([0]) - kept) == alone.state_bytes([0]) - kept


def test_blocks_shrink_one_side() -> None:
    config = PionConfig(**PUBLISHED, tp_mode="blockwise", blocks=4)
    found = moments(1, 16, 8, config, "rows")
    assert found["m_out"].shape == (1, 4, 4, 4) and found["m_in"].shape == (1, 8, 8)
    assert found["m_out"].local(2) == (1, 2, 4, 4) and found["m_in"].local(2) == (1, 8, 8)
    assert moments(1, 16, 8, config, None)["m_out"].shape == (1, 16, 16)


@pytest.mark.parametrize("options", [{}, PUBLISHED], ids=["default", "published"])
def test_the_collectives_do_not_grow_with_the_matrices(options: dict[str, object]) -> None:
    counts = []
    for layers in (8, 80):
        matrices = [
            MatrixPlan(weight=f"w{i}", part="p", batch=1, m=8, n=8, axis="rows", group=0)
            for i in range(layers)
        ]
        plan = build_plan(matrices, [4], PionConfig(**options))
        counts.append({op: x.calls for op, x in plan.collectives([1], 1).items()})
    assert counts[0] == counts[1] and sum(counts[0].values()) <= 1 + 2 * WAVES


@pytest.mark.parametrize("ranks", [1024])
def test_a_plan_of_a_thousand_ranks_is_the_same_on_all(ranks: int) -> None:
    plans = [plan_of(ranks, cut=4) for _ in range(2)]
    other = plan_of(ranks, cut=4, betas=(0.9, 0.95))
    assert plans[0].digest(0) == plans[1].digest(0) != other.digest(0)
    assert max(plans[0].flop([rank]) for rank in range(ranks)) < plan_of(1).flop([0])


def test_a_difference_is_named() -> None:
    mine, other = plan_of(2).lines(0), plan_of(2, betas=(0.9, 0.95)).lines(0)
    assert differences(mine, [mine, mine]) == ""
    assert "rank 1" in (found := differences(mine, [mine, other])) and "betas=(0.9, 0.95)" in found
    assert "w3" in differences(mine, [mine[:-1]]) and "nothing" in differences(mine, [mine[:-1]])


@pytest.mark.parametrize(
    ("options", "axis", "ranks", "named"),
    [
        ({"tp_mode": "blockwise", "blocks": 4}, "rows", 8, "blocks=4 is not a multiple of the 8"),
        ({"tp_mode": "blockwise", "blocks": 5}, "rows", 1, "12 rows"),
        ({"tp_mode": "blockwise", "blocks": 3}, "cols", 1, "8 cols"),
        ({"tp_mode": "distributed"}, "rows", 3, "tp_mode='owner'"),
        ({"direction": "polar", "tp_mode": "distributed"}, "cols", 8, "12 rows of its 12x8"),
    ],
)
def test_what_does_not_divide_is_named(
    options: dict[str, object], axis: Axis, ranks: int, named: str
) -> None:
    config = PionConfig(**PUBLISHED | options)
    assert named in unfit(12, 8, config, axis, ranks)
    assert unfit(12, 8, config, None, ranks) == ""


def test_polar_divides_the_rows_of_the_larger_side() -> None:
    """Of 12 x 8 matrices cut either way; of square ones the side that is cut."""
    config = PionConfig(tp_mode="distributed")
    for m, n, axis, left, right in (
        (12, 8, "rows", 6, 8),
        (12, 8, "cols", 6, 8),
        (8, 12, "rows", 8, 6),
        (8, 8, "rows", 4, 8),
        (8, 8, "cols", 8, 4),
    ):
        found = moments(3, m, n, config, axis)
        r = min(m, n)
        assert found["left"].local(2) == (3, left, r) and found["right"].local(2) == (3, right, r)
        assert found["m"].local(2) == (3, left if left < m else m, right if right < n else n)
        assert found["sigma"].local(2) == (3, r)
    # The cut side of 9 columns need not divide: rows are exchanged.
    assert unfit(12, 9, config, "cols", 4) == ""


def test_heads_are_dealt_and_not_cut() -> None:
    qkv = (("q", 4), ("k", 2), ("v", 2))
    info = ParamInfo(name="w", shape=(8, 5), qkv=qkv, head_dim=2, tp_axis="rows", tp_size=2)
    heads, whole = (classify(info, PionConfig(qkv=kind)) for kind in ("head", "qkv"))
    assert heads.view.axis is None and heads.view.whole_shapes(2) == {"head": (4, 2, 5)}
    assert whole.view.axis == "rows" and whole.view.whole_shapes(2)["q"] == (1, 8, 5)


def test_what_cannot_be_cut_is_refused_unless_excluded() -> None:
    info = ParamInfo(name="linear_qkv.weight", shape=(8, 5), unsupported="too few query groups")
    with pytest.raises(ValueError, match="too few query groups"):
        classify(info, PionConfig())
    assert isinstance(classify(info, PionConfig(), exclude=["qkv"]), Scalar)


def test_a_gate_that_is_not_split_cannot_be_cut() -> None:
    info = ParamInfo(name="fc1", shape=(8, 5), gated=True, tp_axis="rows", tp_size=2)
    with pytest.raises(ValueError, match="--pion-no-split-gate"):
        classify(info, PionConfig(split_gate=False))
