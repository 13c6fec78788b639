"""The doctor names what is broken on a machine, and one broken package hides no other."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_patches import seams
from pion_dist import doctor

ROOT = Path(__file__).parents[2]
CHECKS = {check.what: check for check in doctor.CHECKS}


@pytest.fixture
def overlay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose packages the doctor's programs find before the installed ones."""
    before = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT), before]))
    return tmp_path


def package(folder: Path, name: str, source: str) -> None:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(source)


def doctored(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pion_dist.doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.slow
def test_this_machine_can_run_pion() -> None:
    done = doctored()
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    assert lines[-1] == "`--optimizer pion` can run."
    for check in doctor.CHECKS:
        state = "ok" if check.fix else ""
        assert any(line[8:].startswith(check.what) and state in line[:8] for line in lines), check
    places = {f"{seam.module}.{seam.name}" for seam in seams.CORE + seams.TRAINING}
    fits = {line.split("fits: ")[1] for line in lines if "fits: " in line}
    assert fits == places


def test_broken_torch_hides_nothing_else(overlay: Path) -> None:
    package(overlay, "torch", "raise ImportError('libcudart.so.13: cannot open')")
    done = doctored()
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert next(line for line in lines if line.startswith("ok      Python"))
    assert "broken  torch                ImportError: libcudart.so.13: cannot open" in lines
    assert "`--optimizer pion` cannot run here:" in lines
    assert f"  torch is broken: {doctor.INSTALL}" in lines


@pytest.mark.slow
def test_a_moved_seam_is_named(overlay: Path) -> None:
    moved = "from megatron_patches import check, seams\n"
    moved += "seams.CORE = (seams.Seam('json', 'gone', 'shows it'),)\nseams.TRAINING = ()\n"
    (overlay / "moved.py").write_text(moved + "check.main()\n")
    done = subprocess.run([sys.executable, overlay / "moved.py"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "MISSING: json has no gone (shows it)" in done.stdout
    assert "this Megatron lacks what is MISSING above" in done.stderr


def test_a_python_that_is_too_old_prevents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PYTHON", (sys.version_info.major, sys.version_info.minor + 1))
    with pytest.raises(RuntimeError, match="Megatron needs Python 3"):
        doctor.check_python()
    assert doctor.Finding(CHECKS["Python"], "broken", []).prevents


def test_a_crash_is_told(overlay: Path) -> None:
    package(overlay, "triton", "import os; os.abort()")
    finding = doctor.examine(CHECKS["Triton"])
    assert finding.state == "broken" and "crashed: signal 6" in finding.lines


def test_a_package_that_hangs_is_told(overlay: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(overlay, "triton", "import time; time.sleep(60)")
    monkeypatch.setattr(doctor, "LIMIT_S", 1)
    assert doctor.examine(CHECKS["Triton"]).lines == ["no answer within 1 s"]


def test_apex_is_told_from_its_namesake(overlay: Path) -> None:
    package(overlay, "apex", "")
    finding = doctor.examine(CHECKS["apex"])
    assert finding.state == "absent" and "another package" in finding.lines[0]


def test_mpi4py_without_its_library_is_broken(overlay: Path) -> None:
    package(overlay, "mpi4py", "class rc: pass")
    (overlay / "mpi4py" / "MPI.py").write_text("raise RuntimeError('cannot load MPI library')")
    finding = doctor.examine(CHECKS["mpi4py"])
    assert finding.state == "broken" and finding.lines[0] == "RuntimeError: cannot load MPI library"


def test_a_message_of_several_lines_is_shown_without_the_traceback() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "raise ValueError('one\\n  two')"], capture_output=True, text=True
    )
    assert doctor.error_of(done.stderr) == ["ValueError: one", "  two"]
    assert doctor.error_of("a warning\nthe last line") == ["the last line"]
    assert doctor.error_of("") == []
