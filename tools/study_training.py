"""One training of a study: real Megatron in a process of its own, and what it measured as JSON.

`study_runner` forks this process from one that has imported Megatron, since that takes longer than
a short training.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import json
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import peers
import torch

import megatron_patches
from megatron_patches import cpu_device

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

if not torch.cuda.is_available():
    cpu_device.install()
    cpu_device.patch_megatron()
megatron_patches.apply()

# Megatron, once it is patched.
from megatron.core.fusions.fused_softmax import FusedScaleMaskSoftmax  # noqa: E402
from megatron.core.transformer.transformer_layer import TransformerLayer  # noqa: E402
from megatron.training import get_args, training  # noqa: E402
from pretrain_bytes import main as pretrain_bytes  # noqa: E402

from megatron_patches.arguments import pion_config  # noqa: E402
from megatron_patches.parameters import named_parameters  # noqa: E402
from pion_dist.classify import Rotated, classify  # noqa: E402
from pion_dist.spectrum import drift, singular_values  # noqa: E402

Spectra = dict[str, torch.Tensor]


class Diverged(Exception):
    """The loss or the gradient's norm is not a number."""


def run(flags: list[str], record: Path, log: Path, *, device: str, watch: bool) -> None:
    """Train, write the record, and end the process: 0 where there is a record.

    Args:
        flags: Megatron's, and those that `peers` takes.
        record: JSON to write.
        log: what Megatron prints.
        device: CUDA's number of the GPU to use; empty for none.
        watch: record the largest activation and attention logit of every iteration.
    """
    with log.open("w") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    one_process = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ.update(one_process | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"})
    if device:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    measured: dict[str, Any] = {"flags": flags, "loss": [], "grad_norm": [], "seconds": []}
    own, megatrons = peers.take_flags(flags)
    if own.iso:
        peers.use_iso()
    _listen(measured, own, watch=watch)
    sys.argv = [str(EXAMPLES / "pretrain_bytes.py"), *megatrons]
    try:
        pretrain_bytes()
    except Diverged:
        measured["diverged"] = len(measured["loss"])
    except BaseException:
        traceback.print_exc()
        _exit(1)
    scratch = record.with_suffix(".tmp")
    scratch.write_text(json.dumps(measured))
    scratch.rename(record)
    _exit(0)


def _exit(status: int) -> NoReturn:
    """End now: there is nothing to save, and tearing Megatron down takes a second."""
    for child in multiprocessing.active_children():  # writes checkpoints, and would stay for ever
        child.kill()
    os._exit(status)


def _listen(measured: dict[str, Any], own: argparse.Namespace, *, watch: bool) -> None:
    """Have Megatron's training write into ``measured`` as it goes on; follow the studies' flags."""
    train, log, evaluate = training.train, training.training_log, training.evaluate
    last = [0.0]

    def listened_train(*args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(train).bind(*args, **kwargs).arguments
        model, optimizer = given["model"], given["optimizer"]
        if own.decay_mult is not None:
            peers.set_decay(optimizer, own.decay_mult)
        if own.fixed_norm:
            peers.FixedNorm(peers.weights(model, pion_config(get_args()))).follow(optimizer)
        before = _spectra(model)
        measured["parameters"] = sum(p.numel() for chunk in model for p in chunk.parameters())
        if watch:
            _watch(model, measured)
        last[0] = time.perf_counter()
        result = train(*args, **kwargs)
        changes = {name: drift(s, t).max().item() for name, s, t in _pairs(before, _spectra(model))}
        measured["drift"], measured["drift_in"] = max(
            (value, name) for name, value in changes.items()
        )
        return result

    def listened_log(*args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(log).bind(*args, **kwargs).arguments
        now = time.perf_counter()
        measured["seconds"].append(now - last[0])
        last[0] = now
        measured["loss"].append(float(given["loss_dict"]["lm loss"]))
        measured["grad_norm"].append(float(given["grad_norm"]))
        if not torch.tensor([measured["loss"][-1], measured["grad_norm"][-1]]).isfinite().all():
            raise Diverged
        return log(*args, **kwargs)

    def listened_evaluate(*args: Any, **kwargs: Any) -> Any:
        result = evaluate(*args, **kwargs)
        measured.setdefault("validation", []).append(float(result[0]["lm loss"]))
        return result

    training.train, training.training_log = listened_train, listened_log
    training.evaluate = listened_evaluate


def _spectra(model: list[torch.nn.Module]) -> Spectra:
    """Singular values of the matrices that the run's --pion flags say, of the float32 masters."""
    spectra, config = {}, pion_config(get_args())
    for info, p in named_parameters(model):
        decision = classify(info, config)
        if isinstance(decision, Rotated):
            master = getattr(p, "main_param", None)
            weight = (p if master is None else master).detach().float().view(p.shape)
            for part, batch in decision.view.split(weight).items():
                spectra[f"{info.name}:{part}"] = singular_values(batch)
    return spectra


def _pairs(a: Spectra, b: Spectra) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    return ((name, values, b[name]) for name, values in a.items())


def _watch(model: list[torch.nn.Module], measured: dict[str, Any]) -> None:
    """Record the largest entry of the residual stream and of the attention's logits."""
    modules = [module for chunk in model for module in chunk.modules()]
    for index, layer in enumerate(m for m in modules if isinstance(m, TransformerLayer)):
        layer.register_forward_hook(
            functools.partial(_note_output, measured.setdefault("activation", []), index == 0)
        )
    for index, softmax in enumerate(m for m in modules if isinstance(m, FusedScaleMaskSoftmax)):
        softmax.register_forward_pre_hook(
            functools.partial(_note_scores, measured.setdefault("logit", []), index == 0)
        )


def _note_output(values: list[float], first: bool, layer: Any, _: Any, output: Any) -> None:
    if layer.training:
        _note(values, first, output[0] if isinstance(output, tuple) else output)


def _note_scores(values: list[float], first: bool, softmax: Any, inputs: Any) -> None:
    if softmax.training:
        _note(values, first, inputs[0].tril())  # a query does not see later keys


def _note(values: list[float], first: bool, x: torch.Tensor) -> None:
    """Raise the iteration's value to the largest entry, or begin a new one."""
    value = x.detach().abs().max().item()
    if first:
        values.append(value)
    else:
        values[-1] = max(values[-1], value)
