"""A plan is the same on all ranks, and shares work, state and traffic evenly."""

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import MSIGN, PUBLISHED

from pion_dist import PionConfig
from pion_dist.classify import ParamInfo, Scalar, classify
from pion_dist.config import Axis
from pion_dist.cost import step_flop
from pion_dist.dealing import deal, loads_of
from pion_dist.matrix_plan import MatrixPlan
from pion_dist.plan import WAVES, StepPlan, differences
from pion_dist.state import divided_axis, divides, moments, unfit
from pion_dist.teams import GroupSizes, build_plan, neighbours, team_sizes


@given(st.lists(st.floats(1, 1e6), max_size=40), st.integers(1, 8))
def test_dealing_is_deterministic_and_even(costs: list[float], ranks: int) -> None:
    sizes = [1] * len(costs)
    teams = deal(costs, sizes, ranks)
    assert teams == deal(list(costs), sizes, ranks)
    loads = loads_of(costs, teams, ranks)
    # Largest first never leaves a rank more than one item above another.
    assert max(loads, default=0) - min(loads) <= max(costs, default=0) * (1 + 1e-9)


def plan_of(ranks: int, *, cut: int = 0, **options: object) -> StepPlan:
    """Four weights that ``ranks`` ranks share, both axes, and one that each has whole.

    They have a shard each, or there are ``cut`` shards.
    """
    shapes = [(12, 8, "rows"), (8, 12, "cols"), (8, 8, "rows"), (12, 8, "rows")]
    config = PionConfig(**options)
    matrices = [
        MatrixPlan(
            weight=f"w{i}",
            part="whole",
            batch=1,
            m=m,
            n=n,
            axis=axis,
            group=0,
            cut=cut or ranks,
            along=divided_axis(m, n, config, axis),
        )
        for i, (m, n, axis) in enumerate(shapes)
    ]
    alone = MatrixPlan(weight="alone", part="whole", batch=2, m=4, n=6)
    teams = team_sizes(ranks, config, cut=cut or ranks)
    return build_plan([*matrices, alone], [GroupSizes(ranks, teams, ranks)], config)


@pytest.mark.parametrize("options", [{}, MSIGN, PUBLISHED], ids=["default", "msign", "published"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_share_the_work_and_the_state(ranks: int, options: dict[str, object]) -> None:
    plan, alone = plan_of(ranks, team_size=1, **options), plan_of(1, **options)
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
    plan, alone = plan_of(2, team_size=2, **options), plan_of(1, **options)
    kept = sum(x.nbytes(4) for x in moments(2, 4, 6, plan.config, None).values())
    for x in plan.matrices:
        if len(x.team) > 1:  # every rank has all of the smaller factor and of Σ
            shapes = moments(x.batch, x.m, x.n, plan.config, x.along)
            kept += sum(moment.nbytes(4) for moment in shapes.values() if moment.dim is None)
    assert 2 * (plan.state_bytes([0]) - kept) == alone.state_bytes([0]) - kept


def test_a_rank_is_told_what_it_computes_and_how_long() -> None:
    """Four weights in teams of 2; on other ranks each is one rank's, and one has two of them."""
    together, apart = (plan_of(2, team_size=size) for size in (2, 1))
    assert "2 alone and 4 in teams of 2 on this rank" in together.totals([0], "cpu")
    counted = [
        int(word) - 2  # two matrices of a weight that is not shared
        for rank in (0, 1)
        for word, what in pairwise(apart.totals([rank], "cpu").split())
        if what == "alone"
    ]
    assert sum(counted) == 4 and all(counted)
    for plan in (together, apart):
        for rank in (0, 1):
            assert f"predicted {1e3 * plan.seconds([rank]):.3g} ms" in plan.totals([rank], "cpu")


def test_blocks_shrink_one_side() -> None:
    config = PionConfig(**PUBLISHED, blocks=4)
    shapes = moments(1, 16, 8, config, "rows")
    assert shapes["m_out"].shape == (1, 4, 4, 4) and shapes["m_in"].shape == (1, 8, 8)
    assert shapes["m_out"].local(2) == (1, 2, 4, 4) and shapes["m_in"].local(2) == (1, 8, 8)
    assert moments(1, 16, 8, config, None)["m_out"].shape == (1, 16, 16)


@pytest.mark.parametrize("options", [{}, PUBLISHED], ids=["default", "published"])
def test_the_collectives_do_not_grow_with_the_matrices(options: dict[str, object]) -> None:
    counts = []
    for layers in (8, 80):
        matrices = [
            MatrixPlan(weight=f"w{i}", part="p", batch=1, m=8, n=8, axis="rows", group=0)
            for i in range(layers)
        ]
        plan = build_plan(matrices, [GroupSizes(4)], PionConfig(**options))
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
    message = differences(mine, [mine, other])
    assert "rank 1" in message and "betas=(0.9, 0.95)" in message
    assert "w3" in differences(mine, [mine[:-1]]) and "nothing" in differences(mine, [mine[:-1]])


@pytest.mark.parametrize(
    ("blocks", "axis", "ranks", "named"),
    [
        (4, "rows", 8, "blocks=4 is not a multiple of the 8"),
        (5, "rows", 1, "12 rows"),
        (3, "cols", 1, "8 cols"),
    ],
)
def test_what_has_no_blocks_is_named(blocks: int, axis: Axis, ranks: int, named: str) -> None:
    config = PionConfig(**PUBLISHED, blocks=blocks)
    assert named in unfit(12, 8, config, axis, ranks)
    assert unfit(12, 8, config, None, ranks) == ""


def test_a_team_has_equal_shares() -> None:
    """Of polar's larger factor, of generators on either side; scales of 8 bits are not divided."""
    polar, lie = PionConfig(), PionConfig(**PUBLISHED)
    assert divides(12, 9, polar, 4) and not divides(12, 9, lie, 4) and not divides(9, 7, polar, 2)
    assert divides(12, 8, lie, 4) and not divides(12, 8, PionConfig(state_dtype="int8"), 2)


def test_the_sizes_of_teams() -> None:
    auto = PionConfig()
    assert team_sizes(24, auto, cut=8) == (1, 2, 4, 8)
    assert team_sizes(6, auto, cut=1) == (1, 2)
    assert team_sizes(64, auto, cut=1) == (1, 2, 4, 8, 16, 32)
    assert team_sizes(64, PionConfig(team_size=16), cut=8) == (1, 2, 4, 8, 16)
    assert team_sizes(64, PionConfig(**PUBLISHED, blocks=6), cut=3) == (3,)


def test_neighbours_in_a_node() -> None:
    """Ranks of a run, 8 to a node: all, every 2nd, every 8th, some of a node, none of its own."""
    assert neighbours(range(32), 8) == 8
    assert neighbours(range(0, 32, 2), 8) == 4
    assert neighbours(range(0, 64, 8), 8) == 1
    assert neighbours([1, 3, 5, 7], 8) == 4
    assert neighbours([6, 7, 8, 9], 8) == 2 and neighbours([7, 8, 9, 10], 8) == 1


def test_a_given_size_is_the_largest() -> None:
    """Matrices that it does not divide have smaller teams, also beside others."""
    config = PionConfig(team_size=4)
    matrices = [
        MatrixPlan(weight=f"w{n}", part="p", batch=1, m=8, n=n, group=0, cut=2, along="rows")
        for n in (5, 7)
    ]
    odd = MatrixPlan(weight="odd", part="p", batch=1, m=6, n=5, group=0, cut=2, along="rows")
    planned = build_plan([*matrices, odd], [GroupSizes(4, (1, 2, 4))], config).matrices
    assert [len(x.team) for x in planned] == [4, 4, 2]


def test_large_matrices_have_larger_teams() -> None:
    """One large matrix beside small ones: it is what the busiest rank would wait for."""
    config = PionConfig(matmul_precision="bf16")
    shapes = [(28672, 8192), *[(1024, 8192)] * 32]
    matrices = [
        MatrixPlan(
            weight=f"w{i}",
            part="p",
            batch=1,
            m=m,
            n=n,
            group=0,
            stored=((0, m * n),) * 16,
            along=divided_axis(m, n, config, None),
        )
        for i, (m, n) in enumerate(shapes)
    ]
    planned = build_plan(matrices, [GroupSizes(16, (1, 2, 4, 8), 8)], config).matrices
    assert len(planned[0].team) > 1 and all(len(x.team) == 1 for x in planned[1:])
    # The members are neighbours, from a multiple of their number on.
    first, size = planned[0].team[0], len(planned[0].team)
    assert planned[0].team == tuple(range(first, first + size)) and first % size == 0


PIECES = st.tuples(
    st.integers(1, 3),  # matrices
    st.integers(1, 5),  # rows of a shard
    st.integers(1, 5),  # columns of a shard
    st.sampled_from(["rows", "cols", None]),  # along which it is one
    st.sampled_from(["rows", "cols"]),  # along which the team divides
    st.sampled_from([1, 2, 3]),  # shards
    st.sampled_from([1, 2, 4]),  # members
    st.lists(st.integers(0, 75), max_size=3),  # ends of ranges
)


@given(PIECES)
def test_boxes_are_each_stored_element_once_where_it_belongs(piece: tuple[Any, ...]) -> None:
    batch, rows, cols, axis, along, cut, members, ends = piece
    cut = cut if axis else 1
    m, n = rows * (cut if axis == "rows" else 1), cols * (cut if axis == "cols" else 1)
    m, n = (m * members, n) if along == "rows" else (m, n * members)
    x = MatrixPlan(
        weight="w", part="p", batch=batch, m=m, n=n, axis=axis, group=0, cut=cut, along=along
    )
    ends = sorted({0, x.shard_numel, *(min(end, x.shard_numel) for end in ends)})
    x = replace(x, stored=tuple(pairwise(ends)), team=tuple(range(members)))
    whole = np.arange(x.numel).reshape(batch, m, n)
    shards = np.split(whole, cut, {"rows": 1, "cols": 2, None: 0}[axis]) if axis else [whole]
    shares = [np.full(x.share_shape, -1) for _ in range(members)]
    for rank in range(cut * len(x.stored)):
        start, stop = x.interval(rank)
        held = shards[rank % cut].reshape(-1)[start:stop]
        seen = np.zeros(stop - start, int)
        for member, share in enumerate(shares):
            boxes = x.boxes(rank, member)
            assert sum(box.numel for box in boxes) == x.flow(rank, member)
            for box in boxes:
                run = slice(box.start, box.start + math.prod(box.run))
                part = [slice(None)] * 3
                part[box.dim] = slice(box.first, box.first + box.shape[box.dim])
                seen[run].reshape(box.run)[tuple(part)] += 1
                at = tuple(slice(a, a + size) for a, size in zip(box.at, box.shape, strict=True))
                assert (share[at] == -1).all()
                share[at] = held[run].reshape(box.run)[tuple(part)]
        assert (seen == 1).all()
    assert (np.concatenate(shares, x.share_dim) == whole).all()


def test_polar_divides_the_rows_of_the_larger_side() -> None:
    """Of 12 x 8 matrices cut either way; of square ones the side that is cut."""
    config = PionConfig()
    for m, n, axis, left, right in (
        (12, 8, "rows", 6, 8),
        (12, 8, "cols", 6, 8),
        (8, 12, "rows", 8, 6),
        (8, 8, "rows", 4, 8),
        (8, 8, "cols", 8, 4),
    ):
        shapes = moments(3, m, n, config, divided_axis(m, n, config, axis), 2)
        r = min(m, n)
        assert shapes["left"].local(2) == (3, left, r) and shapes["right"].local(2) == (3, right, r)
        assert shapes["m"].local(2) == (3, left if left < m else m, right if right < n else n)
        assert shapes["sigma"].local(2) == (3, r)


def test_heads_are_dealt_and_not_cut() -> None:
    qkv = (("q", 4), ("k", 2), ("v", 2))
    info = ParamInfo(name="w", shape=(8, 5), qkv=qkv, head_dim=2, tp_axis="rows", tp_size=2)
    heads, whole = (classify(info, PionConfig(qkv=kind)) for kind in ("head", "qkv"))
    assert heads.view.axis is None and heads.view.whole_shapes(2) == {"head": (4, 2, 5)}
    assert whole.view.axis == "rows" and whole.view.whole_shapes(2)["q"] == (1, 8, 5)


def test_part_of_a_query_group_is_seen_in_the_whole_weight() -> None:
    """More ranks than query groups: a rank's rows are no matrices of their own."""
    qkv = (("q", 4), ("k", 2), ("v", 2))
    info = ParamInfo(
        name="w", shape=(4, 5), qkv=qkv, head_dim=2, tp_axis="rows", tp_size=2, split_groups=True
    )
    shard, alone = (
        classify(info, PionConfig()),
        classify(ParamInfo(name="w", shape=(8, 5), qkv=qkv, head_dim=2), PionConfig()),
    )
    assert shard.of_whole and shard.ranks == 2 and shard.view == alone.view
    assert not alone.of_whole


def test_what_cannot_be_cut_is_refused_unless_excluded() -> None:
    info = ParamInfo(name="linear_qkv.weight", shape=(8, 5), unsupported="too few query groups")
    with pytest.raises(ValueError, match="too few query groups"):
        classify(info, PionConfig())
    assert isinstance(classify(info, PionConfig(), exclude=["qkv"]), Scalar)


def test_a_gate_that_is_not_split_cannot_be_cut() -> None:
    info = ParamInfo(name="fc1", shape=(8, 5), gated=True, tp_axis="rows", tp_size=2)
    with pytest.raises(ValueError, match="--pion-no-split-gate"):
        classify(info, PionConfig(split_gate=False))
