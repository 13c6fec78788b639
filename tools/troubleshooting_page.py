"""Write docs/troubleshooting.md, the page of refusals and warnings, from the code.

python tools/troubleshooting_page.py
"""

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import megatron_patches

ROOT = Path(megatron_patches.__file__).parent.parent
PAGE = Path(__file__).parent.parent / "docs" / "troubleshooting.md"
ABOUT = """# Troubleshooting

Refusals and warnings of `megatron_patches` and `pion_dist`, by topic. `…` stands for a name or a
value that the message fills in: search for the words around it. In Megatron an option appears as
its flag: `team_size=` is `--pion-team-size=`. Reasons of many refusals are in
[Teams and layouts](layouts.md#refused). `tools/troubleshooting_page.py` writes this page from the
code.
"""
# A parameter's reason for a refusal, see `ParamInfo`.
REASONS = ("unsupported",)
KINDS = ("ValueError", "RuntimeError", "TypeError", "SeamError", "LaunchError", "warning", "error")
TOPICS = {
    "Flags and options": r"megatron_patches/(arguments|parser)|pion_dist/config",
    "Starting the ranks": "megatron_patches/(__main__|launch|cpu_device|fused_adam)",
    "Versions of Megatron and Transformer Engine": "megatron_patches/(seams|transformer_engine)",
    "Weights and their matrices": "megatron_patches/(parameters|initialization|megatron_optimizer)|"
    "pion_dist/(classify|matrices|parameters|kernels|slots|dtensor|state)",
    "Checkpoints": "megatron_patches/(checkpoint_checks|sharded_state|stacks)|pion_dist/moments",
    "The optimizer and its steps": "megatron_patches/(distributed_optimizer|process_groups)|"
    "pion_dist/(optimizer|param_groups|execute|combined|factors|guard|exchange)",
    "Tools": "pion_dist/(doctor|scale)",
}
AS_IT_SAYS = "as the message says"
# What to do, by a fragment of the message. Every message of megatron_patches needs one.
ADVICE = {
    "no --optimizer with choices": "Install a supported Megatron: `python -m pion_dist.doctor`.",
    "no recipe": "Take one of [these names](flags.md#what-each-recipe-sets).",
    "has nothing to scale": "Leave `--pion-init-scale` out, or choose another `--pion-init`.",
    "multiple of --tensor-model-parallel-size": "Change `--pion-blocks`.",
    "must be a number of iterations": "Give a whole number, or 0.",
    "--pion-spectrum-exact needs": "Add `--pion-spectrum-interval N`.",
    "below --lr-warmup-init": "Lower `--lr-warmup-init`.",
    "must be a positive number": "Give a number above 0.",
    "needs --ckpt-format torch_dist": "Add `--ckpt-format torch_dist`.",
    "needs --use-distributed-optimizer": "Add it, or leave `--fp8-param-gather` out.",
    "--optimizer pion does not support …": (
        "Take the flag that the message names, or leave it out ([why](layouts.md#refused))."
    ),
    "pion_recipe=…: must be one of": "Take a recipe that the message lists.",
    "--async-save writes moments": "Leave one of the two flags out.",
    "rows of all of Mamba's projections": "Add `--pion-exclude in_proj`.",
    "has a part of a query group": (
        "Set `--use-distributed-optimizer`, or leave the weight to Adam with "
        "`--pion-exclude linear_qkv`."
    ),
    "is no regular expression": "Correct the pattern, one for Python's `re.search`.",
    "alone sets nothing": "Unpack `megatron_patches.recipe(NAME)` ([how](integrations.md)).",
    "with use_distributed_optimizer=": "Change both configs ([how](integrations.md)).",
    "with use_layer_wise_distributed": "Change both configs ([how](integrations.md)).",
    "optimizer='pion' does not support": (
        "Set the field that the message names in its place ([why](layouts.md#refused))."
    ),
    "no such script": "Give the path of a training script after the launcher's own flags.",
    "must run before megatron.core": "Start the script with `python -m megatron_patches --cpu`.",
    "capturable=True needs": "Leave `capturable` out on the CPU.",
    "SLURM_STEP_TASKS_PER_NODE": "Pass on all variables that srun sets, unchanged.",
    "takes the GPU of its number": "Ask for `--gpus-per-node` and `--gpu-bind none`.",
    "does not resolve": "Set `MASTER_ADDR` to the first node's address.",
    "but not": "Set all of the launcher's variables or none ([which](launch.md)).",
    "MASTER_PORT=…: set one": "Set `MASTER_PORT` to a free port.",
    "is not a number: unset it": "Unset the variable, or set a number.",
    "ranks count from 0": "Correct the variables, or unset them ([which](launch.md)).",
    "srun did not start": "Put `srun` before the command.",
    "mpi4py is missing": "Install `'.[mpi]'`, in `pion_dist`'s folder.",
    "mpi4py found no MPI library": "Load the module of your MPI.",
    "but mpi4py sees": "Use the mpirun of the MPI that mpi4py was built with.",
    "rank 0 cannot open": "Set `MASTER_ADDR` and `MASTER_PORT` to a free address of rank 0.",
    "and WORLD_SIZE=…, but": "Unset `RANK`, `WORLD_SIZE` and `LOCAL_RANK`.",
    "is not installed": "Install the two packages.",
    "does not have what": "Install the version that is named, or report the missing place.",
    "needs emerging-optimizers": "Install it.",
    "no value before rounding": "Build the model anew, or use `--pion-init keep`.",
    "which --optimizer pion supports": "Change the flags ([which](fp8.md#what-works)).",
    "in a way that pion_dist": "Install a supported Megatron: `python -m pion_dist.doctor`.",
    "must be neighbours": "Make the process groups with `tp` first in their order.",
    "'s, not Pion's": "Nothing, if the weight is to start as zeros "
    "([why](layouts.md#what-each-weight-becomes)).",
    "imported by name before": "Call `megatron_patches.apply()` at the top of the script.",
    "not in the model's sharded_state_dict": "Report the model: its checkpoints lack parameters.",
    "of interleaved gates needs": "Use `--pion-init fan_in` or expert tensor parallel size 1.",
    "--pion-init found a weight of": "Use `--pion-exclude` or `--pion-init keep`.",
    "has no state of --optimizer pion": "Add `--no-load-optim` or `--finetune`.",
    "Set the learning rates": "Restore the rates, or add `--override-opt-param-scheduler`.",
    "Set --pion-exclude": "Restore what has changed, or load the weights alone.",
    "was saved with another": "Restore the option, or load the weights alone.",
    "is a stack of": "Report the model: its state can be trained but not saved.",
    "is not the product of": "Nothing, if your script changed the weight on purpose.",
    "the gradient was not finite": "Nothing, if it is rare; else lower the learning rate.",
    "singular values before the first": "Wait: this is progress, not a fault.",
    "is not finite": "Look for the first iteration with such a loss or weight.",
    "differ between ranks": "Start all ranks with the same options and weights.",
}


def text(node: ast.expr | None, constants: Mapping[str, ast.expr]) -> str:
    """A message's own words, with … for what is filled in."""
    match node:
        case ast.Constant(value=str(words)):
            return re.sub(r"%[sd]|%\.\w+", "…", words)
        case ast.JoinedStr(values=parts):
            return "".join(text(part, constants) for part in parts)
        case ast.FormattedValue(value=ast.Name(id=name)) | ast.Name(id=name) if name in constants:
            return text(constants[name], constants)
        case ast.BinOp(left=left, right=right):
            return text(left, constants) + text(right, constants)
    return "…"


def expressions(tree: ast.Module) -> Iterator[ast.expr]:
    """What a module's messages are made of: those of errors, and reasons for others to raise."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=func, args=[message, *_]):
                if getattr(func, "id", getattr(func, "attr", "")) in KINDS:
                    yield message
            case ast.FunctionDef() if (ast.get_docstring(node) or "").startswith("Why "):
                returns = [n for n in ast.walk(node) if isinstance(n, ast.Return)]
                yield from (each.value for each in returns if each.value is not None)
            case ast.Assign(targets=[ast.Subscript(slice=ast.Constant(value=key))], value=reason):
                if key in REASONS:
                    yield reason


def messages() -> Iterator[tuple[str, str]]:
    """Each module's messages of two words or more."""
    for package in ("megatron_patches", "pion_dist"):
        for path in sorted((ROOT / package).rglob("*.py")):
            tree = ast.parse(path.read_text())
            constants = {
                node.targets[0].id: node.value
                for node in tree.body
                if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
            }
            for message in sorted(expressions(tree), key=lambda each: each.lineno):
                words = " ".join(text(message, constants).split())
                if len(re.findall("[A-Za-z]{2,}", words)) > 1:
                    yield path.relative_to(ROOT).as_posix(), words


def advice(module: str, message: str) -> str:
    for fragment, what in ADVICE.items():
        if fragment in message:
            return what
    if module.startswith("pion_dist"):
        return AS_IT_SAYS
    raise SystemExit(f"{module}: say in ADVICE what to do about {message!r}")


def page() -> str:
    unique = list(dict.fromkeys(messages()))
    if idle := [f for f in ADVICE if not any(f in message for _, message in unique)]:
        raise SystemExit(f"ADVICE: no message has {idle[0]!r}")
    if lost := [m for m, _ in unique if not any(re.match(t, m) for t in TOPICS.values())]:
        raise SystemExit(f"TOPICS: none for {lost[0]}")
    lines = []
    for topic, modules in TOPICS.items():
        lines += ["", f"## {topic}", "", "| message | from | what to do |", "|---|---|---|"]
        for module, message in unique:
            if re.match(modules, module):
                shown = message.replace("|", r"\|").replace("`", "'")
                source = f"[{module.split('/', 1)[1]}](../{module})"
                lines.append(f"| `{shown}` | {source} | {advice(module, message)} |")
    return ABOUT + "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE)
