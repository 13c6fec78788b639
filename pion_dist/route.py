"""What a rank sends and gets of a wave of matrices, on their way to the teams and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .matrix_plan import Box, MatrixPlan


class Route:
    """A rank's part in a wave; made once, used in every step."""

    def __init__(
        self, pieces: Mapping[int, MatrixPlan], flags: Mapping[int, int], *, rank: int, size: int
    ) -> None:
        """Work out the counts.

        Args:
            pieces: matrices by number; the same, in the same order, on every rank of the group.
            flags: elements that travel back beside each one's weights.
            rank: this one's in the group.
            size: of the group.
        """
        self.pieces, self.flags, self.rank = pieces, flags, rank
        self.mine = [i for i, x in pieces.items() if rank in x.team]
        # By rank, in its order of pieces: what it computes of this rank's, and this of its.
        self.sent: list[list[tuple[int, list[Box]]]] = [[] for _ in range(size)]
        for i, x in pieces.items():
            for place, member in enumerate(x.team):
                if boxes := x.boxes(rank, place):
                    self.sent[member].append((i, boxes))
        self.got = [
            [
                (i, boxes)
                for i in self.mine
                if (boxes := pieces[i].boxes(other, pieces[i].team.index(rank)))
            ]
            for other in range(size)
        ]
        self.sent_to, self.got_from = ([_numel(each) for each in x] for x in (self.sent, self.got))
        self.back_from, self.back_to = (
            [_numel(each) + sum(flags[i] for i, _ in each) for each in x]
            for x in (self.sent, self.got)
        )

    def stored(self, i: int) -> int:
        """Elements of a piece that this rank stores."""
        start, stop = self.pieces[i].interval(self.rank)
        return stop - start


def _numel(pieces: Sequence[tuple[int, list[Box]]]) -> int:
    return sum(box.numel for _, boxes in pieces for box in boxes)
