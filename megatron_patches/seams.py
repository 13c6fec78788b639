"""The places of Megatron that the patches hold on to, and the check that they are there.

Every seam is checked before the first is touched, so that a Megatron in which one has moved is
refused as a whole instead of training something else.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


class SeamError(RuntimeError):
    """Megatron or Transformer Engine lacks a seam, or it has moved."""


@dataclass(frozen=True)
class Seam:
    """A named object of another package with the parameters or attributes that the patches use.

    Attributes:
        module: where it is.
        name: of the object in the module.
        parameters: that its signature must have.
        attributes: that it must have.
        why: what is done there.
    """

    module: str
    name: str
    why: str
    parameters: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()

    def check(self) -> str | None:
        """What is missing, or None."""
        try:
            target = getattr(importlib.import_module(self.module), self.name)
        except ImportError as error:
            return f"module {self.module} does not import ({error})"
        except AttributeError:
            return f"{self.module} has no {self.name}"
        have = set(inspect.signature(target).parameters) if self.parameters else set()
        if missing := [p for p in self.parameters if p not in have]:
            return f"{self.module}.{self.name} takes no {', '.join(missing)}"
        if missing := [a for a in self.attributes if not hasattr(target, a)]:
            return f"{self.module}.{self.name} has no {', '.join(missing)}"
        return None


CORE = (
    Seam(
        "megatron.core.optimizer.optimizer_config",
        "OptimizerConfig",
        "gets a field for every flag",
        attributes=("__dataclass_fields__", "optimizer"),
    ),
    Seam(
        "megatron.core.model_parallel_config",
        "ModelParallelConfig",
        "says whether weights have initial values",
        attributes=("perform_initialization",),
    ),
    Seam(
        "megatron.core.optimizer.optimizer_config",
        "ParamKey",
        "routes parameters to Pion or Adam",
        parameters=("predicate",),
    ),
    Seam(
        "megatron.core.optimizer.optimizer_config",
        "ParamPredicate",
        "routes parameters to Pion or Adam",
        parameters=("name", "fn"),
    ),
    Seam(
        "megatron.core.optimizer.emerging_optimizers",
        "_EMERGING_OPTIMIZERS",
        "registers the optimizer",
        attributes=("__setitem__",),
    ),
    Seam(
        "megatron.core.optimizer.emerging_optimizers",
        "EmergingOptimizerEntry",
        "registers the optimizer",
        parameters=(
            "optimizer_cls",
            "init_state_fn",
            "config_to_kwargs",
            "default_param_overrides",
        ),
    ),
    Seam(
        "megatron.core.optimizer",
        "get_megatron_optimizer",
        "classifies parameters, draws initial weights, prints the plan",
        parameters=("config", "model_chunks"),
    ),
    Seam(
        "megatron.core.optimizer",
        "_get_param_groups",
        "multiplies Pion's learning rates",
        parameters=("model_chunks", "config", "config_overrides"),
    ),
    Seam(
        "megatron.core.optimizer",
        "get_standard_config_overrides",
        "gives Adam's parameters the weight decay that they have in AdamW's run",
        parameters=("config",),
    ),
    Seam(
        "megatron.core.optimizer",
        "get_mup_config_overrides",
        "sets Pion's learning rates under muP",
        parameters=("config", "mup_width_mult", "optimizer_type"),
    ),
    Seam(
        "megatron.core.optimizer.optimizer_config",
        "ParamWithNamePredicate",
        "sets Pion's learning rates under muP",
        parameters=("name", "fn"),
    ),
    Seam(
        "megatron.core.optimizer.optimizer",
        "Float16OptimizerWithFloat16Params",
        "tells Pion of the float32 masters",
    ),
    Seam(
        "megatron.core.fp8_utils",
        "is_float8tensor",
        "tells weights that are kept in FP8",
        parameters=("tensor",),
    ),
    Seam(
        "megatron.core.optimizer.optimizer",
        "param_group_identifier_keys",
        "names parameter groups in checkpoints",
        attributes=("__iter__",),
    ),
    Seam(
        "megatron.core.optimizer.distrib_optimizer",
        "DistributedOptimizer",
        "holds Pion beside Adam, and tells which ranges of weights this rank stores",
        parameters=("optimizer", "per_model_buffers", "data_parallel_group"),
        attributes=("_get_model_param_range_map",),
    ),
    Seam(
        "megatron.core.dist_checkpointing",
        "load",
        "refuses state of another optimizer or of other matrices",
        parameters=("sharded_state_dict", "checkpoint_dir"),
    ),
    Seam(
        "megatron.core.dist_checkpointing",
        "load_common_state_dict",
        "refuses state of another optimizer or of other matrices",
        parameters=("checkpoint_dir",),
    ),
    Seam(
        "megatron.core.dist_checkpointing.dict_utils",
        "nested_values",
        "refuses state of another optimizer or of other matrices",
    ),
    Seam(
        "megatron.core.dist_checkpointing.strategies.torch",
        "_get_filesystem_reader",
        "refuses state of another optimizer or of other matrices",
        parameters=("checkpoint_dir",),
    ),
    Seam(
        "megatron.core.datasets.utils",
        "compile_helpers",
        "is spared where the helpers are compiled already",
    ),
    Seam(
        "megatron.core.dist_checkpointing.optimizer",
        "make_sharded_optimizer_tensor",
        "writes moments to torch_dist checkpoints",
        parameters=("model_param", "optim_param", "prefix"),
    ),
    Seam(
        "megatron.core.dist_checkpointing.optimizer",
        "get_param_id_to_sharded_param_map",
        "finds each parameter's place in the whole model",
        parameters=("model_sharded_state_dict", "optim_params_iter"),
    ),
)

TRAINING = (
    Seam(
        "megatron.core.dist_checkpointing",
        "load_content_metadata",
        "loads a distributed optimizer's state into any layout",
    ),
    Seam(
        "megatron.training.global_vars",
        "_GLOBAL_ARGS",
        "loads a distributed optimizer's state into any layout",
    ),
    Seam(
        "megatron.training.arguments",
        "add_megatron_arguments",
        "adds the flags",
        parameters=("parser",),
    ),
    Seam(
        "megatron.training.training",
        "get_megatron_optimizer",
        "the name by which pretrain() makes its optimizer",
        parameters=("config", "model_chunks"),
    ),
    Seam(
        "megatron.training.arguments",
        "validate_args",
        "takes --use-distributed-optimizer as Adam's",
        parameters=("args", "defaults"),
    ),
    Seam(
        "megatron.training.arguments",
        "_print_args",
        "takes --use-distributed-optimizer as Adam's",
        parameters=("title", "args"),
    ),
    Seam(
        "megatron.training.training",
        "get_mup_config_overrides",
        "the name by which pretrain() asks for muP's learning rates",
        parameters=("config", "mup_width_mult", "optimizer_type"),
    ),
    Seam(
        "megatron.training.training",
        "train_step",
        "reports on spectra and steps",
        parameters=("optimizer", "iteration"),
    ),
    Seam(
        "megatron.training.checkpointing",
        "_load_base_checkpoint",
        "refuses checkpoints without optimizer state",
        parameters=("load_dir", "args", "rank0"),
    ),
    Seam("megatron.training.global_vars", "get_tensorboard_writer", "reports on spectra and steps"),
    Seam("megatron.training.global_vars", "get_wandb_writer", "reports on spectra and steps"),
)


def megatron_version() -> str:
    """The installed megatron-core's version.

    Raises:
        SeamError: there is none.
    """
    if importlib.util.find_spec("megatron") is None:
        raise SeamError(
            "megatron-core is not installed: pip install megatron-core==0.19.2 "
            "emerging-optimizers==0.3.0"
        )
    info: Any = importlib.import_module("megatron.core.package_info")
    # Without the commit that Megatron adds: it is that of any git repository with .venv in it.
    return str(info.__version__).partition("+")[0]


def has_training() -> bool:
    """Whether ``megatron.training`` is there (core alone can be used without it)."""
    return importlib.util.find_spec("megatron.training") is not None


def needed() -> tuple[Seam, ...]:
    """The seams of what is here of Megatron."""
    return CORE + TRAINING if has_training() else CORE


def missing(seams: Iterable[Seam]) -> list[str]:
    """A line for each seam that is missing or has moved."""
    return [f"  {what} ({seam.why})" for seam in seams if (what := seam.check()) is not None]


def check() -> None:
    """Check every seam in Megatron.

    Raises:
        SeamError: names the version and every seam that is missing or has moved.
    """
    version = megatron_version()
    if moved := missing(needed()):
        raise SeamError(
            f"megatron-core {version} does not have what pion_dist holds on to; 0.19.2 does:\n"
            + "\n".join(moved)
        )
    emerging = importlib.import_module("megatron.core.optimizer.emerging_optimizers")
    if not emerging.HAVE_EMERGING_OPTIMIZERS:
        raise SeamError(
            f"megatron-core {version} needs emerging-optimizers for --optimizer pion: "
            "pip install emerging-optimizers==0.3.0"
        )
