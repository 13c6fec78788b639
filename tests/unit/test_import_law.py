"""Rooms import only from their own floor or a lower one, and the lowest two without torch."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(ROOT.glob("pion_dist/**/*.py"))

# From below. A room imports from its own floor or a lower one. So what no file up to some floor
# imports, such as torch, does not come to these rooms by way of others either.
FLOORS = (
    ("config", "recipes", "iterations", "matrices", "classify"),
    ("state", "cost", "traffic", "matrix_plan", "dealing", "route", "plan", "teams", "checkpoint"),
    ("kernels", "update", "storage", "offload", "guard", "spectrum", "initialization"),
    ("exchange", "dtensor"),
    (
        "factors",
        "slots",
        "local_plan",
        "moments",
        "param_groups",
        "execute",
        "optimizer",
        "parameters",
        "combined",
        "diagnostics",
        "__init__",
    ),
    ("scale",),
    ("doctor",),
)
WITHOUT_TORCH = [room for floor in FLOORS[:2] for room in floor]


def floor_of(room: str) -> int:
    """Number of a room's floor; a name that is no room is one that the package exports."""
    room = room if any(room in floor for floor in FLOORS) else "__init__"
    return next(i for i, floor in enumerate(FLOORS) if room in floor)


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[1].removesuffix(".py")


def nodes(tree: ast.AST, *, types: bool) -> Iterator[ast.AST]:
    """Everything in a source; without ``types``, but for what only type checkers read."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not types:
            continue
        yield node
        yield from nodes(node, types=types)


def imports(path: Path, *, types: bool = True) -> set[str]:
    """Absolute names of everything a file imports."""
    names: set[str] = set()
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in nodes(ast.parse(path.read_text()), types=types):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) + 1 - node.level]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            names |= {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.distributed"):
            names.add("torch.distributed")
    return names


def reaches(path: Path, *names: str, types: bool = True) -> list[str]:
    return [
        i for i in imports(path, types=types) if any(i == n or i.startswith(n + ".") for n in names)
    ]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_import_law(path: Path) -> None:
    room = room_of(path)
    assert any(room in floor for floor in FLOORS), "a new room needs a floor"
    for name in reaches(path, "pion_dist"):
        other = name.partition(".")[2].partition(".")[0]
        assert floor_of(other) <= floor_of(room), f"{other} is on a higher floor"
    assert not reaches(path, "megatron", "megatron_patches")
    if room not in ("exchange", "dtensor"):
        assert not reaches(path, "torch.distributed"), "only these know process groups"
    if room != "kernels":
        assert not reaches(path, "triton"), "kernels.backend decides what computes"
    if room in WITHOUT_TORCH:
        assert not reaches(path, "torch", types=False), "plans hold no tensors"


CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()


def test_long_files_have_a_reason_and_no_function_is_long() -> None:
    sources = [*SOURCES, *ROOT.glob("megatron_patches/*.py")]
    texts = {str(path.relative_to(ROOT)): path.read_text() for path in sources}
    long = {name for name, text in texts.items() if len(text.splitlines()) > 300}
    rows = r"^\| `((?:pion_dist|megatron_patches)/\w+\.py)` \|"
    assert long == set(re.findall(rows, CONTRIBUTING, re.MULTILINE))
    assert len(long) <= 5
    lengths = [
        (f"{name}: {node.name}", node.end_lineno - body_of(node)[0].lineno + 1)
        for name, text in texts.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef) and node.end_lineno and body_of(node)
    ]
    assert [each for each in lengths if each[1] > 60] == []


def body_of(node: ast.FunctionDef) -> list[ast.stmt]:
    """A function's statements without its docstring."""
    return node.body[1:] if ast.get_docstring(node) is not None else node.body


def test_contributing_has_these_floors() -> None:
    rows = re.findall(r"^\| (\d) \| (.*?) \|$", CONTRIBUTING, re.MULTILINE)
    floors = {int(number): set(re.findall(r"`(\w+)`", rooms)) for number, rooms in rows}
    assert floors == {i: set(floor) - {"__init__"} for i, floor in enumerate(FLOORS)}


@pytest.mark.parametrize("folder", ["pion_dist", "megatron_patches", "tools"])
def test_contributing_has_a_line_for_each_room(folder: str) -> None:
    (listed,) = re.findall(rf"^    {folder}/\n((?:      .*\n)+)", CONTRIBUTING, re.MULTILINE)
    rooms = re.findall(r"^ {6}(\w+(?:\.py|/))", listed, re.MULTILINE)
    files = {path.name for path in (ROOT / folder).glob("*.py") if path.name[0] != "_"}
    folders = {f"{path.parent.name}/" for path in (ROOT / folder).glob("*/__init__.py")}
    assert sorted(rooms) == sorted(files | folders)


def test_rooms_without_tensors_import_where_there_is_no_torch() -> None:
    """In a process of its own: this one has torch already."""
    program = (
        "import importlib, sys\n"
        "sys.modules.update(torch=None, triton=None)\n"
        "for room in sys.argv[1:]:\n"
        "    importlib.import_module('pion_dist.' + room)\n"
    )
    command = [sys.executable, "-c", program, *WITHOUT_TORCH]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_law_sees_a_breach() -> None:
    update = ROOT / "pion_dist" / "update" / "step.py"
    assert reaches(update, "torch") and reaches(update, "pion_dist.config")
    assert reaches(ROOT / "pion_dist" / "doctor.py", "pion_dist.Pion")
    assert floor_of("Pion") == floor_of("__init__") > floor_of("update") > floor_of("state")
    typed = ROOT / "pion_dist" / "matrices.py"
    assert reaches(typed, "torch") and not reaches(typed, "torch", types=False)
