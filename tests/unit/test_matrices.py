"""Merging inverts splitting, and a view's rows are where Megatron stores them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pion_dist.classify import ParamInfo, Rotated, Scalar, classify
from pion_dist.config import PionConfig, choices
from pion_dist.matrices import MatrixView, Part, interleaved, stacked, whole

sizes = st.integers(1, 5)


@st.composite
def views(draw: st.DrawFn) -> MatrixView:
    cols, count, height = draw(sizes), draw(sizes), draw(sizes)
    kind = draw(st.sampled_from(["whole", "stacked", "per repetition", "gathered"]))
    if kind == "whole":
        return whole(height, cols)
    if kind == "stacked":
        return stacked(count * height, cols, name="head", count=count)
    repeated = [(f"p{index}", draw(sizes)) for index in range(draw(st.integers(1, 4)))]
    rows = count * sum(length for _, length in repeated)
    return interleaved(rows, cols, repeated=repeated, per_repetition=kind == "per repetition")


@given(views(), st.booleans(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_merge_is_the_inverse_of_split(
    view: MatrixView, transposed: bool, dtype: torch.dtype
) -> None:
    weight = torch.arange(view.rows * view.cols, dtype=dtype).view(view.rows, view.cols)
    if transposed:  # not contiguous
        weight = weight.T.contiguous().T
    before = weight.clone()
    parts = view.split(weight)
    assert {name: tuple(part.shape) for name, part in parts.items()} == view.shapes
    copies = {name: part.clone() for name, part in parts.items()}
    weight.zero_()
    view.merge(copies, weight)
    assert torch.equal(weight, before)
    # And the other way round: what is merged is what a split then finds.
    doubled = {name: part * 2 for name, part in copies.items()}
    view.merge(doubled, weight)
    assert all(torch.equal(part, doubled[name]) for name, part in view.split(weight).items())


def test_split_copies_only_where_rows_must_be_gathered() -> None:
    weight = torch.zeros(8, 3)
    for view in (
        whole(8, 3),
        stacked(8, 3, name="head", count=4),
        interleaved(8, 3, repeated=[("q", 2), ("k", 1), ("v", 1)], per_repetition=True),
    ):
        for part in view.split(weight).values():
            part.fill_(1.0)
        assert weight.eq(1.0).all()
        weight.zero_()


@pytest.mark.parametrize(
    "parts",
    [
        (Part("a", 4, 0, 2, 1),),
        (Part("a", 4, 0, 3, 1), Part("b", 4, 2, 2, 1)),
        (Part("a", 3, 0, 3, 1),),
        (Part("a", 4, 0, 4, 3),),
        (Part("a", 4, 0, 2, 1), Part("a", 4, 2, 2, 1)),
    ],
    ids=["gap", "overlap", "period", "batch", "names"],
)
def test_parts_that_do_not_tile_are_refused(parts: tuple[Part, ...]) -> None:
    with pytest.raises(ValueError):
        MatrixView(4, 2, parts)


def test_weight_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="not \\[4, 2\\]"):
        whole(4, 2).split(torch.zeros(2, 4))


# Two query groups of two heads of 3 rows: Megatron stores q q k v | q q k v.
GQA = ParamInfo(
    name="decoder.layers.0.self_attention.linear_qkv.weight",
    shape=(24, 5),
    qkv=(("q", 6), ("k", 3), ("v", 3)),
    head_dim=3,
)
GATED_ATTENTION = ParamInfo(
    name="linear_qkv.weight",
    shape=(36, 5),
    qkv=(("q", 6), ("gate", 6), ("k", 3), ("v", 3)),
    head_dim=3,
)


@pytest.mark.parametrize(
    ("info", "qkv", "shapes"),
    [
        (GQA, "qkv", {"q": (1, 12, 5), "k": (1, 6, 5), "v": (1, 6, 5)}),
        (GQA, "head", {"head": (8, 3, 5)}),
        (GQA, "group", {"q": (2, 6, 5), "k": (2, 3, 5), "v": (2, 3, 5)}),
        (GQA, "whole", {"whole": (1, 24, 5)}),
        (
            GATED_ATTENTION,
            "qkv",
            {"q": (1, 12, 5), "gate": (1, 12, 5), "k": (1, 6, 5), "v": (1, 6, 5)},
        ),
        (GATED_ATTENTION, "head", {"head": (12, 3, 5)}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_fused_qkv(info: ParamInfo, qkv: str, shapes: dict) -> None:
    decision = classify(info, PionConfig(qkv=qkv))
    assert isinstance(decision, Rotated)
    assert decision.view.shapes == shapes


def test_qkv_rows_are_gathered_over_query_groups() -> None:
    decision = classify(GQA, PionConfig(qkv="qkv"))
    assert isinstance(decision, Rotated)
    rows = torch.arange(24.0)[:, None].expand(24, 5)
    parts = decision.view.split(rows)
    assert parts["q"][0, :, 0].tolist() == [0, 1, 2, 3, 4, 5, 12, 13, 14, 15, 16, 17]
    assert parts["k"][0, :, 0].tolist() == [6, 7, 8, 18, 19, 20]
    assert parts["v"][0, :, 0].tolist() == [9, 10, 11, 21, 22, 23]


def test_every_qkv_granularity_is_covered() -> None:
    for qkv in choices()["qkv"]:
        assert isinstance(classify(GQA, PionConfig(qkv=qkv)), Rotated)


def test_gated_fc1() -> None:
    info = ParamInfo(name="mlp.linear_fc1.weight", shape=(8, 3), gated=True)
    split = classify(info, PionConfig())
    one = classify(info, PionConfig(split_gate=False))
    assert isinstance(split, Rotated) and split.view.shapes == {"gate": (1, 4, 3), "up": (1, 4, 3)}
    assert isinstance(one, Rotated) and one.view.shapes == {"whole": (1, 8, 3)}
    turns = classify(
        ParamInfo(name="fc1", shape=(8, 3), gated=True, gate_interleave=2), PionConfig()
    )
    assert isinstance(turns, Rotated)
    assert turns.view.split(torch.arange(8.0)[:, None].expand(8, 3))["gate"][0, :, 0].tolist() == [
        0, 1, 4, 5,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("info", "reason"),
    [
        (ParamInfo(name="norm.weight", shape=(4,)), "1-D"),
        (ParamInfo(name="conv.weight", shape=(4, 1, 3)), "3-D"),
        (ParamInfo(name="out", shape=(4, 4), embedding_or_output=True), "embedding or output"),
        (ParamInfo(name="mlp.router.weight", shape=(4, 4)), "excluded by 'router'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_left_to_adam_and_why(info: ParamInfo, reason: str) -> None:
    decision = classify(info, PionConfig(), exclude=["router"])
    assert isinstance(decision, Scalar)
    assert reason in decision.reason
