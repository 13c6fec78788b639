"""The ``--pion-*`` flags: one table that makes the arguments, Megatron's config and PionConfig."""

from __future__ import annotations

import argparse
import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from pion_dist import RECIPES, PionConfig
from pion_dist.config import choices
from pion_dist.initialization import KINDS
from pion_dist.recipes import in_bf16

_CHOICES = choices()
DEFAULT_RECIPE = "pretrain"
_DEFAULT = RECIPES[DEFAULT_RECIPE]
# Options of the own recipes that follow the training: in float32, and with --bf16.
FOLLOWING = {"matmul_precision": ("highest", "bf16"), "state_dtype": ("fp32", "bf16")}
INITS = ("keep", *KINDS)
INIT_OF_RECIPE = {
    "pretrain": "fan_in",
    "finetune": "keep",
    "paper-60m": "keep",
    "paper-1.3b": "keep",
    "paper-rl": "keep",
}


@dataclass(frozen=True)
class Flag:
    """One option of a run: ``--pion-<name>`` and its field in args and in OptimizerConfig.

    Attributes:
        name: as it is on the command line, without ``--pion-``.
        default: also of the config's field; a recipe's comes before it on the command line.
        help: for ``--help``.
        options: further arguments of ``add_argument``.
        dest: if not ``name``.
    """

    name: str
    default: Any
    help: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    dest: str = ""

    @property
    def field(self) -> str:
        """Name of the attribute in args and in OptimizerConfig."""
        return "pion_" + (self.dest or self.name).replace("-", "_")


def _choice(name: str, help_: str) -> Flag:
    option = name.replace("-", "_")
    return Flag(name, getattr(_DEFAULT, option), help_, {"choices": _CHOICES[option], "type": str})


def _team_size(text: str) -> int | str:
    """A number, or what PionConfig judges."""
    return int(text) if text.isdecimal() else text


FLAGS = (
    Flag(
        "recipe",
        DEFAULT_RECIPE,
        "Sets the defaults of the other --pion flags; a flag that is given wins. pretrain: from "
        "scratch. finetune: from trained weights. paper-60m, paper-1.3b, paper-rl: the options of "
        "the runs in arXiv 2605.12492; pion_dist/recipes.py says what else those runs had.",
        {"choices": tuple(RECIPES), "type": str},
    ),
    _choice(
        "momentum",
        "What the first moment of directions other than polar averages: the generators (lie), the "
        "gradient, rotated along with the weight (transported), or the gradient as it is "
        "(ambient).",
    ),
    _choice(
        "direction",
        "polar: Muon's step, by as much of it as turns the weight's singular frames. Its steps "
        "have root mean square 0.2 * lr, as AdamW's. Or a skew generator for each side: of "
        "m/(sqrt(v)+eps) (adaptive), of m (momentum), or its matrix sign (msign). The flags for "
        "momentum, eps, side, scaling, rms, retraction and degree are of these.",
    ),
    Flag(
        "nesterov",
        _DEFAULT.nesterov,
        "Use the look-ahead average beta1*m + (1-beta1)*g in place of m.",
        {"action": argparse.BooleanOptionalAction},
    ),
    Flag(
        "lr-mult",
        1.0,
        "Pion's learning rate is so many times Adam's: --lr and --min-lr times it, on the same "
        "schedule. Warm-up starts from --lr-warmup-init for both. The learning rate that Megatron "
        "logs is Adam's where they differ.",
        {"type": float},
    ),
    _choice(
        "scaling",
        "rms: the first-order change of a weight has root mean square lr * --pion-rms. none: the "
        "generator is scaled by lr alone (with msign, lr is the angle).",
    ),
    Flag("beta1", _DEFAULT.betas[0], "Decay of the first moment.", {"type": float}),
    Flag("beta2", _DEFAULT.betas[1], "Decay of the second moment.", {"type": float}),
    Flag("eps", _DEFAULT.eps, "Added to Pion's denominators.", {"type": float}),
    _choice(
        "side",
        "The orthogonal factors a step applies: both, one in turns (in first), or always one.",
    ),
    Flag("rms", _DEFAULT.rms, "What --pion-scaling rms aims at, per unit of lr.", {"type": float}),
    _choice(
        "retraction",
        "From a skew generator to an orthogonal factor: exp cut at --pion-degree (taylor), the "
        "Cayley transform, or exp.",
    ),
    Flag("degree", _DEFAULT.degree, "Degree of --pion-retraction taylor, 2 to 8.", {"type": int}),
    _choice(
        "qkv",
        "What a fused QKV weight is to Pion: Q, K and V as three matrices (qkv), every head one "
        "(head), per query group its Q, its K, its V (group), or the fused weight as one (whole).",
    ),
    Flag(
        "no-split-gate",
        _DEFAULT.split_gate,
        "Rotate a gated MLP's first weight as one matrix, not as gate and up.",
        {"action": "store_false"},
        dest="split-gate",
    ),
    Flag(
        "exclude",
        None,
        "Leave parameters whose name matches this regular expression to Adam (re.search; "
        "repeatable). Names are printed by --pion-print-plan.",
        {"action": "append", "metavar": "REGEX"},
    ),
    Flag(
        "matmul-precision",
        None,
        "Precision of products that only decide where a weight moves (generators, matrix sign, "
        "moments): IEEE float32 (highest), TF32 (high) or bf16. What moves the weight is IEEE "
        "float32, or with high and bf16 on GPUs three bf16 products of its pieces (2^-16), so that "
        "its spectrum is kept. Torch's global float32 settings do not count.",
        {"choices": _CHOICES["matmul_precision"], "type": str},
    ),
    _choice(
        "state-layout",
        "Of Lie moments: the strict lower triangle, half the bytes (packed), or all (dense). "
        "Checkpoints are the same.",
    ),
    Flag(
        "state-dtype",
        None,
        "Of Pion's averages (polar's factors stay float32): as computed (fp32), or rounded when "
        "stored: to bf16, half the bytes, for betas up to 0.99, or to int8 with a scale for each "
        "128 elements, for betas up to 0.95.",
        {"choices": _CHOICES["state_dtype"], "type": str},
    ),
    Flag(
        "offload-state",
        _DEFAULT.offload_state,
        "Keep Pion's moments in pinned host memory, and bring each batch of matrices' to the GPU "
        "while the batch before is computed. The digits are the same; --pion-print-plan says the "
        "bytes.",
        {"action": "store_true"},
    ),
    Flag(
        "team-size",
        _DEFAULT.team_size,
        "At most so many of the ranks that together store a matrix compute it together, each its "
        "rows of the longer dimension; a power of two. auto: up to 32 neighbours, as makes the "
        "busiest rank's step shortest by a count of FLOP and bytes. The result is the same.",
        {"type": _team_size, "metavar": "RANKS"},
    ),
    Flag(
        "blocks",
        _DEFAULT.blocks,
        "2 or more are another algorithm, on one rank too, whose result depends on this number and "
        "not on the layout: the orthogonal factor on the axis that tensor parallelism cuts is "
        "block-diagonal, of so many blocks; a multiple of the tensor-parallel ranks. State and "
        "work of that side shrink by it. Shards exchange no weight or gradient.",
        {"type": int},
    ),
    Flag(
        "spectrum-reset-interval",
        _DEFAULT.spectrum_reset_interval,
        "Every so many steps each of Pion's matrices gets back the singular values that it had at "
        "the start, against rounding over millions of steps. Each has a step of its own in the "
        "interval. Costs a singular value decomposition in float64; the values are in the "
        "checkpoint. 0: never.",
        {"type": int, "metavar": "STEPS"},
    ),
    Flag(
        "spectrum-interval",
        0,
        "Every so many iterations, report how far singular values have drifted since the start (or "
        "the checkpoint that was loaded), and what the step did, in the log and to TensorBoard and "
        "Weights & Biases where Megatron writes to them. docs/diagnostics.md says what the numbers "
        "mean. 0: never.",
        {"type": int, "metavar": "ITERATIONS"},
    ),
    Flag(
        "spectrum-exact",
        False,
        "With --pion-spectrum-interval, measure all singular values of large matrices too, not "
        "two norms of them.",
        {"action": "store_true"},
    ),
    Flag(
        "init",
        "keep",
        "Pion never changes a weight's spectrum, so the initial one decides the run. keep: the "
        "model's own initial weights. Or redraw every matrix of Pion's, of m rows and n columns. "
        "fan_in: N(0, 1/n), a Gaussian's spread of singular values. orthogonal: all singular "
        "values are max(1, sqrt(m/n)), for the norm that fan_in has. spectral: Gaussian, the "
        "largest singular value being sqrt(m/n). These weights are the same in every layout, and "
        "a checkpoint that Megatron loads wins over them; where a script puts trained weights into "
        "the model itself, say keep, or --pion-recipe finetune. Works with any --optimizer, for "
        "comparisons, on the matrices that the --pion flags say.",
        {"choices": INITS, "type": str},
    ),
    Flag(
        "init-scale",
        1.0,
        "What the weights of --pion-init are multiplied by, and so their singular values.",
        {"type": float},
    ),
    Flag(
        "print-plan",
        False,
        "Print the run's options; for every parameter whether it is Pion's, and as which "
        "matrices, or why it is Adam's; then what a step costs.",
        {"action": "store_true"},
    ),
)

# Megatron's own arguments that its OptimizerConfig does not carry: its new field, the argument and
# a default. For --pion-init, process groups and checkpoints.
CARRIED = (
    ("pion_seed", "seed", 1234),
    ("pion_timeout", "distributed_timeout_minutes", None),
    ("pion_override_scheduler", "override_opt_param_scheduler", False),
)

# Megatron's options that Pion cannot train with, by their fields in args, in OptimizerConfig and
# in DistributedDataParallelConfig; and the options to use in their place, if there are any.
UNSUPPORTED = {
    "fp16": "bf16",
    "optimizer_cpu_offload": "pion_offload_state",
    "optimizer_cuda_graph": "",  # would freeze the learning rate, the count of steps and the sides
    "fp4_param_gather": "",
    "use_precision_aware_optimizer": "pion_state_dtype",
    "use_megatron_fsdp": "use_distributed_optimizer",
    "use_torch_fsdp2": "use_distributed_optimizer",
    "overlap_param_gather_with_optimizer_step": "",
}


def recipe_values(name: str) -> dict[str, Any]:
    """The defaults that a recipe gives to flags, by their field; None: see ``followed``."""
    values = dataclasses.asdict(RECIPES[name])
    if in_bf16(name) != RECIPES[name]:
        values |= dict.fromkeys(FOLLOWING)
    beta1, beta2 = values.pop("betas")
    values |= {"beta1": beta1, "beta2": beta2, "init": INIT_OF_RECIPE[name]}
    return {f"pion_{option}": value for option, value in values.items()}


def recipe(name: str) -> dict[str, Any]:
    """Return the fields of OptimizerConfig that a recipe sets, for scripts that make the config.

    ``OptimizerConfig(optimizer="pion", **recipe("paper-60m"))``. Change what is to differ before it
    is made: a field is what it is given, whatever ``pion_recipe`` says.

    Args:
        name: the recipe's name.

    Raises:
        ValueError: there is no recipe of that name.
    """
    if name not in RECIPES:
        raise ValueError(f"no recipe {name!r}: must be one of {', '.join(map(repr, RECIPES))}")
    return {"pion_recipe": name, **recipe_values(name)}


def followed(source: Any, option: str) -> Any:
    """Of Megatron's args or OptimizerConfig: what is given, or else what follows --bf16."""
    given = getattr(source, f"pion_{option}")
    return FOLLOWING[option][getattr(source, "bf16", False)] if given is None else given


def follows(option: str) -> str:
    """What an option is that follows --bf16, in words."""
    in_float32, in_bf16 = FOLLOWING[option]
    return f"{in_bf16} with --bf16, and else {in_float32}"


def pion_config(source: Any) -> PionConfig:
    """PionConfig of Megatron's args or OptimizerConfig.

    Raises:
        ValueError: a value is not allowed or contradicts another; names the flag.
    """
    values = {
        field.name: getattr(source, f"pion_{field.name}")
        for field in dataclasses.fields(PionConfig)
        if field.name != "betas"
    }
    values |= {option: followed(source, option) for option in FOLLOWING}
    try:
        return PionConfig(betas=(source.pion_beta1, source.pion_beta2), **values)
    except ValueError as error:
        raise ValueError(_in_flags(str(error))) from None


def _in_flags(message: str) -> str:
    """PionConfig's message with flags in its options' place."""
    for field in dataclasses.fields(PionConfig):
        flag = f"--pion-{field.name.replace('_', '-')}="
        flag = "(--pion-beta1, --pion-beta2)=" if field.name == "betas" else flag
        message = re.sub(rf"\b{field.name}=", flag, message)
    return message


def extend_config(config_cls: type) -> None:
    """Give Megatron's OptimizerConfig a field for every flag (modified in place; idempotent).

    In place, because it is imported by name in many modules; Megatron copies every field that
    args has.
    """
    fields = {flag.field: flag.default for flag in FLAGS}
    fields |= {field: default for field, _, default in CARRIED}
    if fields.keys() <= config_cls.__dataclass_fields__.keys():  # type: ignore[attr-defined]
        return
    for name, default in fields.items():
        config_cls.__annotations__[name] = Any
        setattr(config_cls, name, default)
    # dataclass() keeps methods that exist; without the generated ones it makes them anew.
    for method in ("__init__", "__repr__", "__eq__"):
        delattr(config_cls, method)
    dataclasses.dataclass(config_cls)
