"""Write docs/flags.md, the page of all --pion-* flags, from the code.

python tools/flags_page.py
"""

import re
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from megatron_patches.arguments import (
    DEFAULT_RECIPE,
    FLAGS,
    Flag,
    follows,
    recipe_values,
)
from megatron_patches.parser import add_pion_arguments
from pion_dist import RECIPES

PAGE = Path(__file__).parent.parent / "docs" / "flags.md"
ABOUT = f"""# Flags

The flags that [pion_dist adds](../megatron_patches/arguments.py) to Megatron's own. They count with
`--optimizer pion`; those of the initial weights count with any optimizer. `tools/flags_page.py`
writes this page from the code.

`--pion-recipe NAME` sets the defaults of most; a flag that is given wins, before it or after it.
Without it the recipe is `{DEFAULT_RECIPE}`. In plain PyTorch the options are those of
[PionConfig](../pion_dist/config.py): `--pion-team-size` is `team_size`, `--pion-beta1` and
`--pion-beta2` are `betas`, `--pion-no-split-gate` is `split_gate=False`. Recipes are
[RECIPES](../pion_dist/recipes.py).

Values that contradict each other are refused before anything is built, with the flag to change.
What Pion refuses of Megatron's own flags is in [Teams and layouts](layouts.md#refused).
"""


def options_of() -> dict[str, str]:
    """How each flag is written on the command line, by its field."""
    parser = ArgumentParser()
    parser.add_argument("--optimizer", choices=["adam"])
    add_pion_arguments(parser)
    written: dict[str, str] = {}
    for action in parser._actions:
        value = f" {action.metavar or 'VALUE'}" if action.nargs is None else ""
        written[action.dest] = ", ".join(f"`{name}{value}`" for name in action.option_strings)
    return written


def section(flag: Flag, written: str) -> list[str]:
    lines = ["", f"### `--pion-{flag.name}`", "", written, "", in_markdown(flag.help)]
    if "choices" in flag.options:
        allowed = ", ".join(f"`{choice}`" for choice in flag.options["choices"])
        lines += ["", f"One of {allowed}."]
    if flag.field in recipe_values(DEFAULT_RECIPE):
        lines += ["", "Default: [the recipe's](#what-each-recipe-sets)."]
    elif flag.options.get("action") is None:
        lines += ["", f"Default: `{flag.default}`."]
    return lines


def in_markdown(text: str) -> str:
    """Flags as code, and no character that means something."""
    return re.sub(r"(--[a-z][a-z0-9-]*)", r"`\1`", re.sub(r"([*_<|])", r"\\\1", text))


def shown(field: str, value: Any) -> str:
    if value is None:
        return in_markdown(follows(field.removeprefix("pion_")))
    return f"`{value}`" if not isinstance(value, bool) else "yes" if value else "no"


def recipes() -> list[str]:
    lines = ["", "## What each recipe sets", ""]
    lines += [f"| | {' | '.join(RECIPES)} |", "|---" * (1 + len(RECIPES)) + "|"]
    for flag in FLAGS:
        if flag.field in recipe_values(DEFAULT_RECIPE):
            cells = [shown(flag.field, recipe_values(name)[flag.field]) for name in RECIPES]
            split = flag.field == "pion_split_gate"  # the flag says no to it
            name = "gate and up as two matrices" if split else f"`--pion-{flag.name}`"
            lines.append(f"| [{name}](#--pion-{flag.name}) | {' | '.join(cells)} |")
    return lines


def page() -> str:
    written = options_of()
    lines = ["", "## Every flag"]
    for flag in FLAGS:
        lines += section(flag, written[flag.field])
    return ABOUT + "\n".join([*recipes(), *lines]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE)
