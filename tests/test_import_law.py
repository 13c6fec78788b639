"""Who may import whom (CONTRIBUTING.md), read from the sources."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(ROOT.glob("pion_dist/**/*.py"))


def imports(path: Path) -> set[str]:
    """Absolute names of everything a file imports."""
    found: set[str] = set()
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) + 1 - node.level]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.distributed"):
            found.add("torch.distributed")
    return found


def reaches(path: Path, *names: str) -> list[str]:
    return [i for i in imports(path) if any(i == n or i.startswith(n + ".") for n in names)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_import_law(path: Path) -> None:
    room = path.relative_to(ROOT).parts[1].removesuffix(".py")
    assert not reaches(path, "megatron", "megatron_patches")
    if room != "exchange":
        assert not reaches(path, "torch.distributed"), "only the exchange knows process groups"
    if room != "kernels":
        assert not reaches(path, "triton"), "kernels.backend decides what computes"
    if room in ("plan", "cost", "config", "recipes", "classify", "state", "checkpoint"):
        assert not reaches(path, "torch"), "plans hold no tensors"


def test_the_law_sees_a_breach() -> None:
    source = ROOT / "pion_dist" / "update" / "step.py"
    assert reaches(source, "torch") and reaches(source, "pion_dist.config")
