"""Order of the tests, and the line that says what a run covered."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis.configuration import set_hypothesis_home_dir

if cache := os.environ.get("XDG_CACHE_HOME"):  # `make test` keeps every cache inside .venv
    set_hypothesis_home_dir(Path(cache) / "hypothesis")

# The same examples in every run, and no limit of time: machines differ and are shared.
settings.register_profile("pion", deadline=None, derandomize=True)
settings.load_profile("pion")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files without slow tests come first, then those with most of them, which take longest."""
    slow = Counter(file_of(item.nodeid) for item in items if is_slow(item))

    def order(item: pytest.Item) -> tuple[bool, int, str, bool]:
        file = file_of(item.nodeid)
        return file in slow, -slow[file], file, is_slow(item)

    items.sort(key=order)


def is_slow(item: pytest.Item) -> bool:
    return item.get_closest_marker("slow") is not None


def file_of(nodeid: str) -> str:
    return nodeid.partition("::")[0]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real text as Megatron's dataset: the prefix of its files."""
    script = Path(__file__).parent.parent / "examples" / "prepare_corpus.py"
    prefix = tmp_path_factory.mktemp("corpus") / "bytes"
    command = [sys.executable, str(script), str(prefix)]
    subprocess.run([*command, "--max-bytes", "400000"], check=True, capture_output=True)
    return prefix


def skip_reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return reason.removeprefix("Skipped: ")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    ran = [
        report
        for word in ("passed", "failed", "xfailed", "xpassed")
        for report in terminalreporter.stats.get(word, [])
    ]
    tables: dict[str, list[str]] = {}
    for report in ran:
        for name, line in report.user_properties:
            tables.setdefault(name, []).append(line)
    for name, lines in tables.items():
        terminalreporter.write_line("\n".join([name, *lines, ""]))
    files = {file_of(report.nodeid) for report in ran}
    line = f"covered: {len(ran)} tests in {len(files)} files"
    reasons = Counter(map(skip_reason, terminalreporter.stats.get("skipped", [])))
    if reasons:
        why = ", ".join(f"{reason} x{n}" for reason, n in reasons.most_common())
        line += f"; skipped: {reasons.total()} ({why})"
    terminalreporter.write_line(line)
