"""Run through the launcher: checks of one process's Pion in Megatron that share a launch.

The model is built from Megatron's own arguments, as training scripts do.
"""

import argparse
import contextlib
import copy
import dataclasses
import io
import logging
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from megatron.core import dist_checkpointing
from megatron.core.enums import ModelType
from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging
from megatron.training import checkpointing
from megatron.training.arguments import parse_and_validate_args, parse_args
from megatron.training.initialize import initialize_megatron
from megatron.training.training import (
    get_megatron_optimizer_config,
    get_model,
    get_optimizer_param_scheduler,
)
from megatron_runs import PUBLISHED_FLAGS
from pretrain_bytes import add_arguments, model_provider

import megatron_patches
from megatron_patches.arguments import pion_config
from megatron_patches.process_groups import made_by_all
from megatron_patches.seams import megatron_version
from pion_dist import RECIPES, Pion, PionConfig
from pion_dist.dtensor import version


def setup(
    model: list | None = None, *, frozen: str = "$^", **changes: object
) -> tuple[list, object, str]:
    """A fresh model and its optimizer, made as pretrain() makes them; and what was printed."""
    from megatron.core.optimizer import get_megatron_optimizer

    def provider(*args: object, **kwargs: object) -> torch.nn.Module:
        built = model_provider(*args, **kwargs)
        for name, p in built.named_parameters():
            p.requires_grad_(re.search(frozen, name) is None)
        return built

    model = model or get_model(provider, ModelType.encoder_or_decoder)
    config, overrides = get_megatron_optimizer_config(ARGS)
    for name, value in changes.items():
        setattr(config, name, value)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        optimizer = get_megatron_optimizer(config, model, config_overrides=overrides)
    return model, optimizer, printed.getvalue()


def inner(optimizer: object) -> Pion:
    (pion,) = (o.optimizer for o in optimizer.chained_optimizers if isinstance(o.optimizer, Pion))
    return pion


def parameters(model: list) -> dict[str, torch.nn.Parameter]:
    return {name.replace("module.", ""): p for name, p in model[0].named_parameters()}


def set_grads(model: list, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in (p for p in model[0].parameters() if p.requires_grad):
        p.main_grad.copy_(torch.randn(p.shape, generator=generator) * 1e-3)


def check_apply_is_idempotent() -> None:
    import megatron.core.optimizer as core
    import megatron.training.training as training

    before = core.get_megatron_optimizer
    megatron_patches.apply()
    assert core.get_megatron_optimizer is before is training.get_megatron_optimizer


def check_compiled_helpers_are_not_made_again() -> None:
    from megatron.core.datasets.utils import compile_helpers

    compile_helpers()  # Megatron's own would exit: the wheel has no Makefile


def check_plan() -> None:
    model, optimizer, printed = setup(pion_print_plan=True, pion_exclude=["linear_proj"])
    rows = {
        line.split()[0]: line for line in printed.splitlines() if "Pion: " in line or "Adam" in line
    }
    names = set(parameters(model))
    assert names <= set(rows), names - set(rows)
    assert "excluded by 'linear_proj'" in rows["decoder.layers.0.self_attention.linear_proj.weight"]
    qkv = rows["decoder.layers.3.self_attention.linear_qkv.weight"]
    assert "q 1 of 64x64, k 1 of 32x64, v 1 of 32x64" in qkv
    assert "gate 1 of 96x64, up 1 of 96x64" in rows["decoder.layers.0.mlp.linear_fc1.weight"]
    assert "embedding or output" in rows["output_layer.weight"]
    pion = {name for name, row in rows.items() if "Pion: " in row and name in names}
    # What the plan says is what the optimizers hold, and what they hold is said.
    held = {slot.name for slot in inner(optimizer)._slots.values()}
    assert held == pion and len(held) == 12
    size = sum(t.nbytes for state in inner(optimizer).state.values() for t in state.values())
    assert f"{size:,} bytes of state, " in printed


def check_config_s_own_defaults() -> None:
    from megatron.core.optimizer import OptimizerConfig

    own = OptimizerConfig(optimizer="pion", lr=1e-3)
    assert pion_config(own) == PionConfig()
    assert own.pion_init == "keep"  # a script's model may have trained weights


def check_recipe() -> None:
    def parsed(*flags: str) -> dict[str, object]:
        given = sys.argv
        sys.argv = [word for word in given if word not in PUBLISHED_FLAGS] + list(flags)
        try:
            args = parse_args(add_arguments)
        finally:
            sys.argv = given
        return {name: value for name, value in vars(args).items() if name.startswith("pion_")}

    plain = parsed()
    given = parsed("--pion-recipe", "paper-60m", "--pion-side", "both", "--pion-print-plan")
    assert parsed() == plain, "a recipe of one parse is another's"
    model, optimizer, printed = setup(**given)
    expected = dataclasses.replace(RECIPES["paper-60m"], side="both")
    assert inner(optimizer).config == expected
    (line,) = (line for line in printed.splitlines() if "recipe paper-60m: " in line)
    # The --pion-init that this launch is given wins over the recipe's.
    assert all(option in line for option in [*expected.lines(), "init='fan_in'"]), line
    for seed in range(3):
        set_grads(model, seed)
        assert optimizer.step()[0]


def check_fan_in() -> None:
    first, again = parameters(setup()[0]), parameters(setup()[0])
    other, kept = parameters(setup(pion_seed=7)[0]), parameters(setup(pion_init="keep")[0])
    adam = parameters(setup(optimizer="adam")[0])
    for name, p in first.items():
        if p.dim() == 2 and name.startswith("decoder"):
            assert torch.equal(p, again[name]) and torch.equal(p, adam[name])
            assert not torch.equal(p, other[name]) and not torch.equal(p, kept[name])
            # Standard deviation of n normal numbers: relative error 1/sqrt(2n), 5 of them.
            expected = p.shape[1] ** -0.5
            assert abs(p.float().std() / expected - 1) < 5 / (2 * p.numel()) ** 0.5, name
    distinct = {p.float().sum().item() for name, p in first.items() if "linear" in name}
    assert len(distinct) == 16, "every weight has a draw of its own"


def check_lr_mult_is_pion_s() -> None:
    def step(**changes: object) -> dict[str, torch.nn.Parameter]:
        model, optimizer, _ = setup(**changes)
        get_optimizer_param_scheduler(optimizer)
        set_grads(model, 0)
        optimizer.step()
        return parameters(model)

    multiplied, plain = step(lr=1e-3, min_lr=1e-4, pion_lr_mult=10.0), step(lr=1e-2, min_lr=1e-3)
    rotated = [n for n, p in plain.items() if n.startswith("decoder") and p.dim() == 2]
    assert len(rotated) == 16 and all(torch.equal(multiplied[n], plain[n]) for n in rotated)
    for norm in (n for n, p in plain.items() if p.dim() == 1):
        # Adam's first step from 1 is lr; half a unit of the weight's last place may be lost.
        moved = (multiplied[norm].float() - 1).abs().max().item()
        assert abs(moved - 1e-3) < torch.finfo(plain[norm].dtype).eps, (norm, moved)


def with_zeros() -> tuple[list, dict[str, torch.nn.Parameter]]:
    """A model with a weight of zeros and one whose V is; and these two."""
    model = get_model(model_provider, ModelType.encoder_or_decoder)
    names = ("layers.1.mlp.linear_fc2.weight", "layers.2.self_attention.linear_qkv.weight")
    fc2, qkv = (f"decoder.{name}" for name in names)
    zeros = {name: parameters(model)[name] for name in (fc2, qkv)}
    with torch.no_grad():
        zeros[fc2].zero_()
        zeros[qkv].unflatten(0, (4, 32))[:, 24:].zero_()  # of 4 query groups: 2 heads of Q, K, V
    return model, zeros


@contextlib.contextmanager
def logged() -> Iterator[io.StringIO]:
    """What Pion logs."""
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    logging.getLogger("pion_dist").addHandler(handler)
    yield text
    logging.getLogger("pion_dist").removeHandler(handler)


def check_weights_of_zeros_are_adam_s() -> None:
    """Weights with a matrix of zeros are neither redrawn nor left; plan and log name them."""
    model, zeros = with_zeros()
    before = {name: p.detach().clone() for name, p in zeros.items()}
    with logged() as text:
        _, optimizer, printed = setup(model, pion_print_plan=True)
    held = {slot.name for slot in inner(optimizer)._slots.values()}
    assert not held & set(zeros) and len(held) == 14
    assert text.getvalue().count("matrix of zeros") == 1, text.getvalue()
    for name, p in zeros.items():
        assert name in text.getvalue()
        (row,) = (line for line in printed.splitlines() if line.split()[:1] == [name])
        assert "Adam: starts with a matrix of zeros" in row
        assert torch.equal(p, before[name]), "--pion-init has drawn it"
    for seed in range(3):
        set_grads(model, seed)
        assert optimizer.step()[0]
    assert all(p.all() for p in zeros.values())
    with logged() as text:  # it has moved since; buffers were made for what it was
        again = {slot.name for slot in inner(setup(model)[1])._slots.values()}
    assert again == held and not text.getvalue()
    with logged() as text:  # in whole, QKV is no matrix of zeros
        whole = {
            slot.name for slot in inner(setup(with_zeros()[0], pion_qkv="whole")[1])._slots.values()
        }
    assert set(zeros) - whole == {name for name in zeros if "linear_fc2" in name}


def check_memory_without_values_is_not_looked_at() -> None:
    """With --no-initialization memory may be zeros, and weights come with a checkpoint."""
    model, zeros = with_zeros()
    model[0].config.perform_initialization = False
    with logged() as text:
        _, optimizer, _ = setup(model, pion_init="keep")
    held = {slot.name for slot in inner(optimizer)._slots.values()}
    assert set(zeros) <= held and not text.getvalue(), text.getvalue()


def check_only_pion_rotates() -> None:
    model, optimizer, _ = setup()
    pion = inner(optimizer)
    before = {name: torch.linalg.svdvals(x.double()) for name, x in pion.matrices()}
    weights = {name: p.detach().clone() for name, p in parameters(model).items()}
    for seed in range(3):
        set_grads(model, seed)
        success, _, _ = optimizer.step()
        assert success
    for name, x in pion.matrices():
        now = torch.linalg.svdvals(x.double())
        # Polar: frames whose inner products, sums of up to 96 terms, are rounded to 2**-24 a term.
        # Taylor: lr .01 * rms .2 / (1/sqrt(64)) = .016 is the relative change; angles of a few
        # times it, .1: 3 steps of theta^4/8 = 4e-5 at the very most. Unrotated AdamW moves by 1e-2.
        bound = 96 * 2**-24 if pion.config.direction == "polar" else 4e-5
        assert ((now - before[name]).abs().max() / before[name].max()) < bound, name
    moved = {name: not torch.equal(p, weights[name]) for name, p in parameters(model).items()}
    assert all(moved.values()), moved


def check_loaded_weights_are_gone_on_from() -> None:
    """Weights that are loaded without state win over factors, also in the midst of a run."""
    model, optimizer, _ = setup()
    pion = inner(optimizer)
    for seed in range(2):
        set_grads(model, seed)
        assert optimizer.step()[0]
    if pion.config.direction == "polar":
        for p in pion.state:
            assert pion._factors._versions[p] == version(p), "a step left it changed"
    loaded = {name: 1.5 * p.detach() for name, p in parameters(model).items() if p.dim() == 2}
    for name, p in parameters(model).items():
        if name in loaded:
            p.data.copy_(loaded[name])
    with logged() as text:
        optimizer.reload_model_params()
        set_grads(model, 2)
        assert optimizer.step()[0]
    polar = pion.config.direction == "polar"
    assert ("taken anew" in text.getvalue()) == polar
    names = {slot.name for slot in pion._slots.values()}
    for name, p in parameters(model).items():
        if name in names:
            # A step of lr .01 changes it by 2% or so, the old weight by a third.
            change = (p.float() - loaded[name].float()).norm() / loaded[name].float().norm()
            assert change < 0.1, (name, change)
    for p, state in pion.state.items() if polar else ():
        for part, whole in pion._slots[p].view.split(p.detach()).items():
            u, sigma, v = (state[f"{name}.{part}"] for name in ("left", "sigma", "right"))
            product = (u * sigma.unsqueeze(-2)) @ v.mT
            # Sums of up to 96 terms of float32.
            assert (product - whole).norm() < 96 * 2**-24 * whole.norm()


def everything(model: list, optimizer: object) -> dict[str, torch.Tensor]:
    pion = inner(optimizer)
    tensors = {f"model {name}": p for name, p in parameters(model).items() if p.dim() == 2}
    for p, state in pion.state.items():
        tensors[f"master {pion._slots[p].name}"] = p
        tensors |= {f"{pion._slots[p].name} {key}": moment for key, moment in state.items()}
    return {name: t.detach().clone() for name, t in tensors.items() if "layers" in name}


def check_non_finite_gradients() -> None:
    for bad in (float("nan"), float("inf")):
        model, optimizer, _ = setup(clip_grad=0.0)
        for seed in range(2):
            set_grads(model, seed)
            optimizer.step()
        before = everything(model, optimizer)
        set_grads(model, 2)
        name = "decoder.layers.1.mlp.linear_fc2.weight"
        parameters(model)[name].main_grad[3, 5] = bad
        optimizer.step()
        for key, tensor in everything(model, optimizer).items():
            assert torch.equal(tensor, before[key]), f"{key} moved"
        with logged() as text:
            inner(optimizer).state_dict()
        assert f"{name} (1 step)" in text.getvalue(), text.getvalue()


def check_megatrons_own_skip() -> None:
    model, optimizer, _ = setup(grad_norm_skip_threshold=1e-6)
    before = everything(model, optimizer)
    set_grads(model, 0)
    assert optimizer.step()[0] is False
    assert all(torch.equal(t, before[k]) for k, t in everything(model, optimizer).items())


def check_state_of_other_options_is_refused() -> None:
    _, optimizer, _ = setup()
    saved = copy.deepcopy(optimizer.state_dict())
    _, other, _ = setup(pion_qkv="head")
    assert "qkv" in refusal(other.load_state_dict, saved)


def refusal(call: Callable[..., object], *args: object, **kwargs: object) -> str:
    try:
        call(*args, **kwargs)
    except ValueError as error:
        return str(error)
    raise AssertionError(f"{call} did not refuse")


def check_other_state_is_refused_in_torch_format_too() -> None:
    def says(**changes: object) -> str:
        before = everything(model, optimizer)
        error = refusal(optimizer.load_state_dict, copy.deepcopy(setup(**changes)[1].state_dict()))
        assert all(torch.equal(t, before[k]) for k, t in everything(model, optimizer).items())
        assert "--no-load-optim" in error and "--finetune" in error, error
        return error

    model, optimizer, _ = setup()
    for other in ("adam", "muon"):
        assert "no state of --optimizer pion, but of another" in says(optimizer=other)
    assert "another --pion-qkv: its qkv is 'head', this run's 'qkv'" in says(pion_qkv="head")
    assert "12 instead of 16 in a group. Set --pion-exclude" in says(pion_exclude=["linear_proj"])
    assert "no state of --optimizer pion" in says(pion_exclude=["."])
    assert "--override-opt-param-scheduler" in says(lr=0.5)


@contextlib.contextmanager
def arguments(**values: object) -> Iterator[None]:
    """Megatron's global arguments, changed for a while."""
    before = {name: getattr(ARGS, name) for name in values}
    vars(ARGS).update(values)
    try:
        yield
    finally:
        vars(ARGS).update(before)


def check_a_checkpoint_without_optimizer_state_is_refused() -> None:
    model, optimizer, _ = setup()
    scheduler = get_optimizer_param_scheduler(optimizer)
    for form in ("torch", "torch_dist"):
        with (
            tempfile.TemporaryDirectory() as folder,
            arguments(save=folder, load=folder, ckpt_format=form, no_save_optim=True),
            arguments(use_dist_ckpt=form != "torch"),
        ):
            checkpointing.save_checkpoint(1, model, optimizer, scheduler, 0)
            load = checkpointing.load_checkpoint
            error = refusal(load, model, optimizer, scheduler)
            assert f"--load {folder}" in error and "or of none" in error, (form, error)
            with arguments(no_load_optim=True):
                assert load(model, optimizer, scheduler)[0] == 1


def move(model: list, optimizer: object, again: list, resumed: object) -> None:
    """Save an optimizer's state, and load it into another's."""
    with tempfile.TemporaryDirectory() as folder:
        records = optimizer.sharded_state_dict(model[0].sharded_state_dict())
        dist_checkpointing.save({"optimizer": records}, folder)
        wanted = resumed.sharded_state_dict(again[0].sharded_state_dict(), True)
        resumed.load_state_dict(dist_checkpointing.load({"optimizer": wanted}, folder)["optimizer"])


def check_a_state_before_the_first_step_moves_twice() -> None:
    """Adam counts no step in it. A converter may load and save it without one.

    Without the distributed optimizer Megatron's Adam has no state before its first step.
    """
    with arguments(use_distributed_optimizer=True):
        made = [setup() for _ in range(3)]
    for (model, optimizer, _), (again, resumed, _) in pairwise(made):
        for p, weight in zip(again[0].parameters(), model[0].parameters(), strict=True):
            p.data.copy_(weight)
        resumed.reload_model_params()
        move(model, optimizer, again, resumed)
    for model, optimizer, _ in (made[0], made[-1]):
        set_grads(model, 1)
        assert optimizer.step()[0]
    straight, moved = (parameters(made[i][0]) for i in (0, -1))
    assert all(torch.equal(p, straight[name]) for name, p in moved.items())


def check_process_groups_have_megatron_s_timeout() -> None:
    config, _ = get_megatron_optimizer_config(ARGS)
    assert config.pion_timeout == ARGS.distributed_timeout_minutes == 10
    (group,) = made_by_all({(0,)}, 7).values()
    options = group._get_backend(torch.device("cpu")).options
    assert options._timeout == timedelta(minutes=7)


def check_without_a_matrix_of_pion_s() -> None:
    """All that is trained is Adam's: all parameters, the embedding, or adapters beside the base."""
    for frozen, exclude in (
        ("$^", "."),
        ("layers|norm|output", None),
        ("^(?!.*linear_proj)", "proj"),
    ):
        given = {"frozen": frozen, "pion_exclude": [exclude] if exclude else []}
        model, optimizer, _ = setup(**given)
        again, resumed, _ = setup(**given)
        set_grads(model, 0)
        assert optimizer.step()[0]
        move(model, optimizer, again, resumed)
        for p, weight in zip(again[0].parameters(), model[0].parameters(), strict=True):
            p.data.copy_(weight)
        for each, made in ((model, optimizer), (again, resumed)):
            set_grads(each, 1)
            assert made.step()[0]
        straight = parameters(model)
        assert any(p.requires_grad for p in straight.values()), frozen
        assert all(torch.equal(p, straight[name]) for name, p in parameters(again).items()), frozen


def check_a_learning_rate_is_logged() -> None:
    everything_else = "embedding|norm|output"
    for frozen, expected in (("$^", 1.0), (everything_else, 8.0)):
        _, optimizer, _ = setup(frozen=frozen, pion_lr_mult=8.0)
        get_optimizer_param_scheduler(optimizer).step(increment=ARGS.global_batch_size)
        logged = get_canonical_lr_for_logging(optimizer.param_groups)
        rates = {group["lr"] for group in optimizer.param_groups}
        assert logged in rates and logged == max(rates) / 8.0 * expected, (logged, rates)


def check_cuda_graphs_of_the_step_are_refused() -> None:
    from megatron_patches.parser import check

    assert "optimizer_cuda_graph=True" in refusal(setup, optimizer_cuda_graph=True)
    args = argparse.Namespace(**{**vars(ARGS), "optimizer_cuda_graph": True})
    assert "does not support --optimizer-cuda-graph: leave it out" in refusal(check, args)


def check_late_apply_is_refused() -> None:
    from megatron_patches.parameters import is_scalar

    try:
        is_scalar(torch.nn.Parameter(torch.zeros(2, 2)))
    except RuntimeError as error:
        assert "apply()" in str(error)
    else:
        raise AssertionError("an unseen parameter was routed")


if __name__ == "__main__":
    ARGS = parse_and_validate_args(add_arguments)
    initialize_megatron()
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            check()
            print(f"{name}: passed", flush=True)
    print(f"all checks passed in megatron-core {megatron_version()}")
