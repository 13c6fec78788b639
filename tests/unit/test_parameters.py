"""Hidden matrices are Pion's and the rest Adam's; the two lists train a PyTorch model."""

import logging
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard

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


class Adapted(nn.Module):
    """A model in PEFT's two wrappers, which hand on the attributes of what they wrap."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = Delegating(model)

    def get_base_model(self) -> nn.Module:
        return self.base_model.model

    def __getattr__(self, name: str) -> object:
        return own_or(super().__getattr__, name, "base_model")


class Delegating(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def __getattr__(self, name: str) -> object:
        return own_or(super().__getattr__, name, "model")


def own_or(own: Callable[[str], object], name: str, inner: str) -> object:
    try:
        return own(name)
    except AttributeError:
        if name == inner:
            raise
        return getattr(own(inner), name)


class Lora(nn.Module):
    """A linear layer with LoRA's two factors."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_A = nn.Linear(base.in_features, 2, bias=False)
        self.lora_B = nn.Linear(2, base.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.lora_B(self.lora_A(x))


@pytest.fixture(scope="module")
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


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


def test_biases_are_no_matrices() -> None:
    """Fused experts have a row each; so have other models' biases of heads."""
    model = nn.Module()
    matrices = ("weight", "biased_projection", "gate_up_proj")
    biases = ("bias", "gate_up_proj_bias", "bias0", "pos_bias_u", "relative_position_bias_table")
    for name in (*matrices, *biases):
        model.register_parameter(name, nn.Parameter(torch.ones(4, 6)))
    model.bias_net = nn.Linear(3, 2, bias=False)
    assert names(model) == ([*matrices, "bias_net.weight"], list(biases))


def test_fused_experts_are_matrices_and_convolutions_are_not() -> None:
    model = nn.Module()
    model.experts, model.conv = nn.Module(), nn.Conv1d(3, 4, 2, bias=False)
    for name in ("gate_up_proj", "down_proj", "idle"):
        model.experts.register_parameter(name, nn.Parameter(torch.ones(4, 6, 5)))
    with torch.no_grad():
        model.experts.idle[2] = 0.0  # this expert would stay zero
    assert names(model) == (
        ["experts.gate_up_proj", "experts.down_proj"],
        ["experts.idle", "conv.weight"],
    )


def with_adapter() -> WithHead:
    model = WithHead()
    model.hidden = Lora(model.hidden)
    return model


def test_a_weight_of_zeros_is_adam_s_with_the_reason(caplog: pytest.LogCaptureFixture) -> None:
    model = with_adapter()
    with caplog.at_level(logging.WARNING, logger="pion_dist"):
        pion, others = names(model)
    assert pion == ["hidden.lora_A.weight"] and "hidden.lora_B.weight" in others
    assert "hidden.lora_B.weight" in caplog.text and "zeros" in caplog.text
    assert "lora_A" not in caplog.text


def test_adapters_train() -> None:
    torch.manual_seed(0)
    model = with_adapter()
    pion, others = split_parameters(model)
    optimizers = [Pion(pion, lr=0.1), torch.optim.AdamW(others, lr=1e-2)]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tokens = torch.randint(11, (4, 8))
    for _ in range(3):  # at the first, the gradient of A is zero
        nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
        for optimizer in optimizers:
            optimizer.step()
    for name in ("hidden.lora_A.weight", "hidden.lora_B.weight"):
        assert not torch.equal(model.get_parameter(name), before[name]), name


def test_memory_without_values_is_not_looked_at(caplog: pytest.LogCaptureFixture) -> None:
    assert names(nn.Linear(4, 3, device="meta"))[0] == ["weight"]
    assert not caplog.text


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DistributedDataParallel": nn.parallel.DistributedDataParallel,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "PEFT": Adapted,
    "compiled, DistributedDataParallel, PEFT": lambda model: torch.compile(
        nn.parallel.DistributedDataParallel(Adapted(model)), backend="eager"
    ),
}


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_model_is_the_bare_one(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = with_adapter()
    bare, wrapped = split_parameters(model), split_parameters(wrap(model))
    for mine, theirs in zip(bare, wrapped, strict=True):
        assert [name for name, _ in mine] == [name for name, _ in theirs]
        assert all(p is q for (_, p), (_, q) in zip(mine, theirs, strict=True))


def test_compiled_layers_and_models_in_a_model_are_the_bare_ones() -> None:
    model = nn.ModuleDict({"policy": WithHead(), "module": nn.Linear(3, 2)})
    bare = names(model)
    assert bare[0] == ["policy.hidden.weight", "module.weight"]
    model["policy"].hidden = torch.compile(model["policy"].hidden, backend="eager")
    assert names(model) == bare


@pytest.mark.usefixtures("one_rank")
def test_dtensors_are_split_as_tensors_and_flat_pieces_are_refused() -> None:
    sharded = WithHead()
    expected = names(sharded)
    fully_shard(sharded)
    assert names(sharded) == expected
    flat = nn.Sequential(WithHead())
    options = {"use_orig_params": True, "sharding_strategy": ShardingStrategy.NO_SHARD}
    flat[0] = FullyShardedDataParallel(flat[0], device_id=torch.device("cpu"), **options)
    with pytest.raises(ValueError, match="0 is wrapped in FullyShardedDataParallel"):
        split_parameters(flat)


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
    # W = U Σ Vᵀ is made anew in a step, so that nothing adds up: of some ten products of up to 8
    # terms and of what is stored, 2**-24 of the largest value each.
    was, now = (torch.linalg.svdvals(w.double()) for w in (before["hidden.weight"], pion[0][1]))
    assert ((now - was).abs() / was.max()).max() < 10 * 8**0.5 * 2.0**-24


def test_a_weight_of_zeros_stays_under_pion_which_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    weight = nn.Parameter(torch.zeros(6, 8))
    weight.grad = torch.randn(6, 8)
    for recipe in RECIPES.values():
        caplog.clear()
        optimizer = Pion([("last", weight)], lr=0.1, config=recipe)
        assert "last: a matrix of zeros" in caplog.text and "AdamW" in caplog.text, recipe
        optimizer.step()
        assert torch.equal(weight.data, torch.zeros(6, 8)), recipe
