"""docs/flags.md is what the code says."""

import subprocess
import sys
from pathlib import Path

from megatron_patches.arguments import FLAGS

ROOT = Path(__file__).parents[2]


def test_the_page_is_what_the_command_writes(tmp_path: Path) -> None:
    # A copy of the command writes beside itself.
    tool = tmp_path / "tools" / "flags_page.py"
    for folder in (tool.parent, tmp_path / "docs"):
        folder.mkdir()
    tool.write_text((ROOT / "tools" / tool.name).read_text())
    subprocess.run([sys.executable, str(tool)], check=True, cwd=ROOT)
    written = (tmp_path / "docs" / "flags.md").read_text()
    assert written == (ROOT / "docs" / "flags.md").read_text(), "run `python tools/flags_page.py`"
    assert all(f"### `--pion-{flag.name}`\n" in written for flag in FLAGS)
