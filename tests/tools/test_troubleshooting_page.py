"""docs/troubleshooting.md is what the code says, and says what to do about each message."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "troubleshooting_page.py"


def test_the_page_is_what_the_command_writes(tmp_path: Path) -> None:
    # A copy of the command writes beside itself.
    copy = tmp_path / "tools" / TOOL.name
    for folder in (copy.parent, tmp_path / "docs"):
        folder.mkdir()
    copy.write_text(TOOL.read_text())
    subprocess.run([sys.executable, str(copy)], check=True, cwd=ROOT)
    written = (tmp_path / "docs" / "troubleshooting.md").read_text()
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    assert written == page, "run `python tools/troubleshooting_page.py`"


def test_a_message_without_advice_is_named() -> None:
    spec = importlib.util.spec_from_file_location("troubleshooting_page", TOOL)
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert tool.advice("pion_dist/new.py", "a new message") == tool.AS_IT_SAYS
    with pytest.raises(SystemExit, match=r"megatron_patches/new\.py: .*'a new message'"):
        tool.advice("megatron_patches/new.py", "a new message")
