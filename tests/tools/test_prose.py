"""Sentences of the documentation are short: at most 20 words on average over a page."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIMIT = 20
# Pages that may have longer sentences, and why.
EXCEPTIONS = {
    "docs/flags.md": "generated",
    "docs/troubleshooting.md": "generated",
}
PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]


def sentences(page: str) -> list[str]:
    """The sentences of a page's prose, without code blocks, equations, tables and headings."""
    page = re.sub(
        r"^```.*?^```|<!--.*?-->|\$\$.*?\$\$", "\n\n", page, flags=re.DOTALL | re.MULTILINE
    )
    # Inline code, an equation and a link's text count as words; a link's address does not.
    page = re.sub(r"`[^`]+`|\$[^$]+\$", "code", page)
    page = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", page)
    # A blank line, a list's item and a table's row start a block of their own.
    blocks = re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.)\s|\||#)", page)
    prose = [b for b in blocks if b.strip() and not re.match(r"\n*(\||#|    )", b)]
    parts = [part for b in prose for part in re.split(r"(?<=[.!?])[*)]*\s+", b.strip())]
    return [part for part in parts if re.search(r"\w", part)]


def mean_length(page: str) -> float:
    lengths = [len(re.findall(r"\S*\w\S*", sentence)) for sentence in sentences(page)]
    return sum(lengths) / len(lengths)


@pytest.mark.parametrize("name", sorted(set(PAGES) - set(EXCEPTIONS)))
def test_sentences_are_short(name: str) -> None:
    words = mean_length((ROOT / name).read_text())
    assert words <= LIMIT, f"{name}: {words:.1f} words a sentence"


def test_long_sentences_are_found() -> None:
    long = " ".join(["word"] * 39) + " end.\n"
    assert mean_length(f"# Title\n\n{long * 2}\n- {long}") == 40


def test_only_prose_counts() -> None:
    page = "# A title\n\nTwo words. See `a b c` [here](there.md).\n\n| a | b |\n|---|---|\n\n"
    page += "```\nsome code\n```\n\n    more code\n\n- An item\n- Another one\n  goes on.\n"
    expected = ["Two words.", "See code here.", "- An item", "- Another one\n  goes on."]
    assert sentences(page) == expected
