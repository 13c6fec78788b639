"""Which parameters of a PyTorch model are Pion's, and that the two lists train it."""

import pytest
import torch
from torch import nn

from pion_dist import RECIPES, Pion, split_parameters


class Model(nn.Module):
    """Embeddings, a matrix, a convolution, a norm and an output layer."""

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.places = nn.Embedding(8, 8)
        self.hidden = nn.Linear(8, 6)
        self.frozen = nn.Linear(6, 6, bias=False).requires_grad_(False)
        self.conv = nn.Conv1d(6, 8, 1)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens) + self.places(torch.arange(tokens.shape[1]))
        x = self.conv(self.frozen(self.hidden(x)).transpose(1, 2)).transpose(1, 2)
        return self.head(self.norm(x))


class WithHead(Model):
    """As Hugging Face's models."""

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def names(model: nn.Module, *exclude: str) -> tuple[list[str], list[str]]:
    pion, others = split_parameters(model, exclude=exclude)
    return [name for name, _ in pion], [name for name, _ in others]


@pytest.mark.parametrize(
    ("model", "exclude"),
    [(WithHead(), ()), (WithHead(tied=True), ()), (Model(tied=True), ()), (Model(), ("^head",))],
    ids=["head", "tied head", "tied", "named"],
)
def test_hidden_matrices_are_pion_s(model: nn.Module, exclude: tuple[str, ...]) -> None:
    pion, others = names(model, *exclude)
    assert pion == ["hidden.weight"]
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(others) == len(set(others)) and set(others) == trained - set(pion)


def test_an_output_layer_that_nothing_names_is_a_matrix() -> None:
    assert names(Model())[0] == ["hidden.weight", "head.weight"]
    assert names(Model(), "weight")[0] == []


def test_both_lists_train_the_model_and_keep_the_spectrum() -> None:
    torch.manual_seed(0)
    model = WithHead()
    pion, others = split_parameters(model)
    optimizers = [Pion(pion, lr=0.1), torch.optim.AdamW(others, lr=1e-2)]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tokens = torch.randint(11, (4, 8))
    losses = []
    for _ in range(20):
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
    # Angle 0.1 a step, of which the cubic stretches by its sixth power over 128: 20 * 8e-9; the
    # weight is rounded to float32 as often, by 6e-8 of its norm each time, which may add up.
    was, now = (torch.linalg.svdvals(w.double()) for w in (before["hidden.weight"], pion[0][1]))
    assert ((now - was).abs() / was.max()).max() < 20 * 1e-7


def test_a_weight_of_zeros_stays() -> None:
    weight = nn.Parameter(torch.zeros(6, 8))
    weight.grad = torch.randn(6, 8)
    for recipe in RECIPES.values():
        Pion([weight], lr=0.1, config=recipe).step()
        assert torch.equal(weight.data, torch.zeros(6, 8)), recipe
