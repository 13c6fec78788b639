"""A wheel that the sdist builds has all of the sources, and works in a clean environment."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from megatron_runs import LIMIT_S, ROOT

import pion_dist

PACKAGES = ("pion_dist", "megatron_patches")
BUILD = "from setuptools import build_meta; build_meta.build_{kind}({out!r})"


def run(*command: str, cwd: Path) -> str:
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PIP_CONSTRAINT")}
    done = subprocess.run(
        command, cwd=cwd, env=kept, capture_output=True, text=True, timeout=LIMIT_S
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def tracked(*folders: str) -> list[str]:
    """Files that git knows and that are there."""
    listed = run("git", "ls-files", "--", *folders, cwd=ROOT).splitlines()
    return [name for name in listed if (ROOT / name).exists()]


def built(kind: str, source: Path, out: Path) -> Path:
    """The wheel or sdist of a source tree, made by the installed setuptools."""
    run(sys.executable, "-c", BUILD.format(kind=kind, out=str(out)), cwd=source)
    (archive,) = out.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("source")
    for name in tracked():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    return built("sdist", source, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the sdist, and nothing but it, builds."""
    unpacked = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(unpacked, filter="data")
    (source,) = unpacked.iterdir()
    return built("wheel", source, tmp_path_factory.mktemp("wheel"))


def test_the_version_stands_once() -> None:
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {pion_dist.__version__}\n" in citation
    assert pion_dist.__version__ in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.slow
def test_the_wheel_has_every_source_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
    assert sorted(names) == sorted(tracked(*PACKAGES))
    assert wheel.name == f"pion_dist-{pion_dist.__version__}-py3-none-any.whl"


@pytest.mark.slow
def test_the_wheel_works_in_a_clean_environment(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=True)
    python = str(tmp_path / "env" / "bin" / "python")
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", str(wheel), cwd=tmp_path)
    # Lends torch and Megatron, gigabytes, to the new environment. This project itself stays behind:
    # it is installed here by a .pth file, which Python does not read in a folder that is lent.
    purelib = sysconfig.get_path("purelib", vars={"base": str(tmp_path / "env")})
    Path(purelib, "lent.pth").write_text(sysconfig.get_path("purelib"))
    code = (
        "import megatron_patches, pion_dist, torch; megatron_patches.apply();"
        "p = torch.nn.Parameter(torch.randn(6, 4)); p.grad = torch.randn(6, 4);"
        "pion_dist.Pion([p]).step(); print(pion_dist.__version__, pion_dist.__file__)"
    )
    printed = run(python, "-W", "ignore", "-c", code, cwd=tmp_path).splitlines()[-1]
    assert printed == f"{pion_dist.__version__} {purelib}/pion_dist/__init__.py"
