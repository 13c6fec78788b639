"""Run through the launcher: trainings one after the other, since starting up takes longer than one.

    python -m megatron_patches --cpu tests/support/many_runs.py jobs.json

Each is what examples/pretrain_bytes.py does. Megatron is imported inside functions: a checkpoint's
writer starts a process that imports this file anew.
"""

from __future__ import annotations

import gc
import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

FROZEN: list[str] = []  # the job's expression, if it has one


def main(jobs: list[dict[str, Any]]) -> None:
    """Train every job, and write its steps beside what Megatron prints.

    Args:
        jobs: each with ``name``, ``flags`` (Megatron's) and ``steps``, the file to write; and
            ``frozen``, an expression for names of parameters that are not trained, if any are.
    """
    import torch
    from pretrain_bytes import main as pretrain_bytes

    steps = watch_steps()
    sum_norms_exactly()
    build_what_the_example_does_not()
    for job in jobs:
        steps.clear()
        sys.argv = [sys.argv[0], *job["flags"]]
        FROZEN[:] = [job["frozen"]] if "frozen" in job else []
        print(f"job: {job['name']}", flush=True)
        try:
            pretrain_bytes()
        except SystemExit as stop:  # --exit-interval
            if stop.code:
                raise
        if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            Path(job["steps"]).write_text(json.dumps(steps))
        tear_down()
    torch.distributed.destroy_process_group()


def start_up_faster() -> None:
    """Do once what Megatron does in every training, and leave out what it imports again.

    Of three trainings on four ranks, 72 s on one core, this leaves 48.
    """
    import multiprocessing

    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.training.argument_utils import ArgumentGroupFactory

    # The process that collects what a checkpoint's writers report is started anew, and imports
    # torch and Megatron. A fork has them. It is made before any process group has its sockets.
    results = multiprocessing.get_context("fork").Manager().Queue()
    filesystem_async._results_queue = results

    # Flags' texts are parsed from the sources of 13 classes, twice a training.
    texts: dict[type, dict[str, str]] = {}
    parse = ArgumentGroupFactory._get_field_docstrings

    def of_class(self: Any, config: type) -> dict[str, str]:
        if config not in texts:
            texts[config] = parse(self, config)
        return texts[config]

    ArgumentGroupFactory._get_field_docstrings = of_class
    gc.freeze()  # what is imported by now; tear_down collects garbage, and looks at all else


def watch_steps() -> list[dict[str, Any]]:
    """A list that gets every iteration's loss and grad norm in full, of what Megatron logs.

    Printed are 7 digits of the one and 3 decimals of the other. And what the next iteration has:
    the learning rate that is logged, and each group's rates and elements on this rank. And how
    often any rank has looked at factors, and has taken them anew, since the iteration before.
    """
    from megatron.training import training

    steps: list[dict[str, Any]] = []
    groups: list[dict[str, Any]] = []
    calls = count_factorizations()
    canonical = training.get_canonical_lr_for_logging

    def get_canonical_lr_for_logging(param_groups: list[dict[str, Any]]) -> Any:
        groups[:] = param_groups
        return canonical(param_groups)

    training.get_canonical_lr_for_logging = get_canonical_lr_for_logging
    original, signature = training.training_log, inspect.signature(training.training_log)

    def training_log(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        losses = {name: float(value) for name, value in given["loss_dict"].items()}  # last stage's
        steps.append(
            {
                "iteration": given["iteration"],
                "losses": losses,
                "grad_norm": float(given["grad_norm"]),
                "lr": given["learning_rate"],
                **of_all_ranks(calls),
                "groups": [
                    {
                        "pion": "pion" in group,
                        "elements": sum(p.numel() for p in group["params"]),
                        **{key: group.get(key) for key in ("max_lr", "min_lr", "lr", "eps")},
                    }
                    for group in groups
                ],
            }
        )
        return original(*args, **kwargs)

    training.training_log = training_log
    return steps


def count_factorizations() -> dict[str, int]:
    """Calls, from now, of what looks whether weights are the product of their factors."""
    from pion_dist.update import polar

    calls = {"mismatch": 0, "factorize": 0}

    def counted(name: str) -> Any:
        original = getattr(polar, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return original(*args, **kwargs)

        return call

    for name in calls:
        setattr(polar, name, counted(name))
    return calls


def of_all_ranks(calls: dict[str, int]) -> dict[str, int]:
    """The ranks' sums of counts, which begin anew (modified in place)."""
    import torch

    counts = torch.tensor(list(calls.values()))
    torch.distributed.all_reduce(counts)
    calls.update(dict.fromkeys(calls, 0))
    return dict(zip(calls, counts.tolist(), strict=True))


def sum_norms_exactly() -> None:
    """Let Megatron sum gradients' squares in float64.

    Without its CUDA kernel it takes torch.norm, whose float32 sum on a CPU is 2e-6 too small for
    256x64 elements and 1e-6 for half of them (measured): as much as layouts may differ by.
    """
    import torch
    from megatron.core.optimizer import clip_grads

    def l2_norm(_chunk: int, _overflow: Any, lists: Any, _per_tensor: bool) -> tuple[Any, None]:
        norms = [tensor.double().norm() for tensors in lists for tensor in tensors]
        return torch.stack(norms).norm().float().view(1), None

    clip_grads.l2_norm_impl = l2_norm


def build_what_the_example_does_not() -> None:
    """Let the model have MTP layers and frozen ones, and MLA an attention that is not TE's.

    Megatron's own DotProductAttention does MLA's arithmetic where all of its heads' sizes are
    kv_channels, but does not take the arguments that say so.
    """
    import pretrain_bytes
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    from megatron_patches.parameters import named_parameters

    make_model, make_attention = pretrain_bytes.GPTModel, DotProductAttention.__init__

    def model(config: Any, spec: Any, *, vp_stage: int | None, **options: Any) -> Any:
        mtp = None
        if config.mtp_num_layers:
            mtp = get_gpt_mtp_block_spec(config, spec, False, vp_stage=vp_stage)
        made = make_model(config, spec, vp_stage=vp_stage, mtp_block_spec=mtp, **options)
        for info, p in named_parameters([made]):
            p.requires_grad_(not any(re.search(frozen, info.name) for frozen in FROZEN))
        return made

    def attention(self: Any, config: Any, *args: Any, **options: Any) -> None:
        sizes = {options.pop("k_channels", None), options.pop("v_channels", None)}
        assert sizes <= {None, config.kv_channels}, f"heads of {sizes}"
        make_attention(self, config, *args, **options)

    pretrain_bytes.GPTModel = start_zeros(model)
    DotProductAttention.__init__ = attention


def start_zeros(make_model: Any) -> Any:
    """Let --start-zeros start attention's output projections as zeros.

    And the first shards of fc2, where tensor parallelism cuts it, which do not make it a matrix of
    zeros; --pion-init draws it anew.
    """
    import pretrain_bytes
    import torch
    from megatron.core.parallel_state import get_tensor_model_parallel_rank as tp_rank
    from megatron.training import get_args

    add_arguments = pretrain_bytes.add_arguments

    def with_start_zeros(parser: Any) -> Any:
        parser.add_argument("--start-zeros", action="store_true")
        return add_arguments(parser)

    @torch.no_grad()
    def model(*args: Any, **options: Any) -> Any:
        made = make_model(*args, **options)
        if get_args().start_zeros:
            cut = get_args().tensor_model_parallel_size > 1 and tp_rank() == 0
            for name, p in made.named_parameters():
                if "linear_proj" in name or (cut and "linear_fc2" in name):
                    p.zero_()
        return made

    pretrain_bytes.add_arguments = with_start_zeros
    return model


def tear_down() -> None:
    """Take Megatron's global state down, but for the process group of all ranks.

    A wrapped model outlives its run by hooks that only autograd knows of, and would hold its
    process groups. Each has a thread that wakes up every 10 ms: after 30 trainings they took 5/6 of
    the time.
    """
    import torch.distributed as dist
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
    from megatron.training.training import destroy_global_state
    from pretrain_bytes import CHUNKS

    destroy_global_state()
    destroy_moe_metrics_tracker()
    MTPLossLoggingHelper.tracker.clear()
    CHUNKS.clear()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    for wrapped in (x for x in gc.get_objects() if isinstance(x, DistributedDataParallel)):
        vars(wrapped).clear()
    gc.collect()


if __name__ == "__main__":
    start_up_faster()  # not where a rank is killed, whose fork would be left behind
    main(json.loads(Path(sys.argv[1]).read_text()))
