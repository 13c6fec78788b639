"""Order of the tests, and the line that says what a run covered."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis.configuration import set_hypothesis_home_dir

if cache := os.environ.get("XDG_CACHE_HOME"):  # `make test` keeps every cache inside .venv
    set_hypothesis_home_dir(Path(cache) / "hypothesis")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Fast tests first, and what takes a worker longest before the rest of its kind."""
    groups = {item: group(item) for item in items}
    size = Counter(groups.values())
    items.sort(key=lambda item: (is_slow(item), -size[groups[item]]))
    if config.getoption("dist", None) == "loadgroup":
        for item in items:
            item.add_marker(pytest.mark.xdist_group(groups[item]))


def is_slow(item: pytest.Item) -> bool:
    return item.get_closest_marker("slow") is not None


def group(item: pytest.Item) -> str:
    """The tests that a worker has to run together: fast ones of a file, and what share a launch."""
    file = item.nodeid.partition("::")[0]
    if not is_slow(item):
        return f"{file} fast"
    fixtures = (
        item._fixtureinfo.name2fixturedefs.values() if isinstance(item, pytest.Function) else ()
    )
    shares = any(each.scope == "module" for definitions in fixtures for each in definitions)
    return file if shares else item.nodeid


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
    files = {report.nodeid.partition("::")[0] for report in ran}
    line = f"covered: {len(ran)} tests in {len(files)} files"
    reasons = Counter(map(skip_reason, terminalreporter.stats.get("skipped", [])))
    if reasons:
        why = ", ".join(f"{reason} x{n}" for reason, n in reasons.most_common())
        line += f"; skipped: {reasons.total()} ({why})"
    terminalreporter.write_line(line)
