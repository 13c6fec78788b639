"""Turn text files into Megatron's indexed dataset: PREFIX.bin and PREFIX.idx.

    python examples/prepare_corpus.py PREFIX                     # Python's own standard library
    python examples/prepare_corpus.py PREFIX --text book.txt notes/ records.jsonl
    python examples/prepare_corpus.py PREFIX --text data/ --tokenizer FOLDER

A token is a byte, or what a Hugging Face tokenizer makes of the text. A file is a document, and so
is every line of a .jsonl file, whose text is in its field "text". A document ends with the
tokenizer's end of text; with bytes with a NUL, which text does not contain.

Train with `--data-path PREFIX` and the flags of the tokenizer, which are printed. Megatron cuts the
validation set off the end (`--split`): files are therefore shuffled, always in the same way, and a
file is either on one side or on both in one piece each. Lines of a .jsonl file stay in order.
"""

import argparse
import codecs
import json
import os
import random
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import batched
from pathlib import Path
from typing import Any

import numpy as np

EOD = 0
TOKENIZER_FLAGS = [
    *("--tokenizer-type", "NullTokenizer", "--vocab-size", "256"),
    *("--null-tokenizer-eod-id", str(EOD), "--make-vocab-size-divisible-by", "64"),
]
# Megatron splits by documents, not by tokens: pieces of one size make the two agree, and let a
# single book be split at all. Lines of .jsonl are many and stay whole.
PIECE = 16 * 1024
MIN_TOKENS = 8 * PIECE  # below this a split such as 9:1 leaves no piece for validation
LIBRARY_BYTES = 8_000_000  # of Python's library, unless more are asked for
BATCH = 256  # documents that a tokenizer gets at a time: it has threads
# Tests, vendored packages and tables are not what the rest of the library looks like.
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "encodings", "_vendor"}


class CorpusError(Exception):
    """What is wrong with the text and what to do about it, for the user."""


@dataclass(frozen=True)
class Tokens:
    """How text becomes numbers.

    Attributes:
        encode: the tokens of several texts.
        eod: the token that ends a document.
        dtype: that holds every token.
        flags: with which Megatron makes the same tokenizer.
    """

    encode: Callable[[list[str]], list[Any]]
    eod: int
    dtype: Any
    flags: list[str]


BYTES = Tokens(
    encode=lambda texts: [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts],
    eod=EOD,
    dtype=np.uint8,
    flags=TOKENIZER_FLAGS,
)


def hugging_face(name: str) -> Tokens:
    """The tokenizer of a model, by its name or folder."""
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise CorpusError("--tokenizer needs: pip install 'pion_dist[examples]'") from None
    from megatron.core.datasets.indexed_dataset import DType

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise CorpusError(f"--tokenizer {name}: {error}") from error
    if tokenizer.eos_token_id is None:
        raise CorpusError(f"--tokenizer {name}: it has no end of text (eos_token)")
    return Tokens(
        encode=lambda texts: tokenizer(texts, add_special_tokens=False)["input_ids"],
        eod=tokenizer.eos_token_id,
        dtype=DType.optimal_dtype(len(tokenizer)),
        flags=["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", name],
    )


def stdlib_sources() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    files = [p for p in root.rglob("*.py") if not SKIPPED.intersection(p.relative_to(root).parts)]
    if not files:
        raise CorpusError(f"no .py file in {root} (zipped or stripped Python?): pass --text PATH")
    return sorted(files, key=lambda p: p.relative_to(root).parts)


def user_files(paths: list[Path]) -> list[Path]:
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise CorpusError(f"--text {path}: no such file or folder")
        inside = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        files += [
            p for p in inside if not any(part.startswith(".") for part in p.relative_to(path).parts)
        ]
    return list(dict.fromkeys(files))


def read_text(path: Path, limit: int) -> str:
    """The file's first bytes; nothing when they are not UTF-8 text."""
    with path.open("rb") as file:
        data = file.read(min(limit, path.stat().st_size))
    try:
        # The limit may cut a character.
        text = codecs.getincrementaldecoder("utf-8")().decode(data)
    except UnicodeDecodeError:
        return ""
    return "" if "\0" in text else text


def read_lines(path: Path, key: str) -> Iterator[str]:
    """The text of every line of a .jsonl file."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)[key]
            except (ValueError, KeyError, TypeError) as error:
                raise CorpusError(
                    f"{path}, line {number}: no JSON object with a field {key!r} (--json-key): "
                    f"{error!r}"
                ) from error
            if not isinstance(text, str):
                raise CorpusError(f"{path}, line {number}: {key!r} is not a text")
            yield text.replace("\0", "")


def documents(files: list[Path], max_bytes: int, key: str) -> Iterator[tuple[str, bool]]:
    """Every document, and whether it may be cut; files in a fixed random order.

    What is no text is left out; max_bytes in all.
    """
    left = max_bytes
    for path in random.Random(0).sample(files, len(files)):
        lines = path.suffix == ".jsonl"
        try:
            for text in read_lines(path, key) if lines else [read_text(path, left)]:
                if left <= 0:
                    return
                if text:
                    yield text, not lines
                    left -= len(text.encode())
        except (OSError, UnicodeDecodeError) as error:
            raise CorpusError(f"cannot read {path}: {error}") from error


class Progress:
    """How far it is, on stderr: a line that is rewritten on a terminal, one now and then elsewhere.

    Args:
        total: bytes of all files; .jsonl has less text than that.
    """

    def __init__(self, total: int) -> None:
        self.total, self.done, self.start = total, 0, time.monotonic()
        self.live = sys.stderr.isatty()
        self.next = self.start + (0.5 if self.live else 10)

    def add(self, size: int) -> None:
        self.done += size
        if (now := time.monotonic()) < self.next:
            return
        self.next = now + (0.5 if self.live else 10)
        rate = self.done / (now - self.start)
        text = f"{self.done / 1e6:,.0f} of {self.total / 1e6:,.0f} MB, {rate / 1e6:.1f} MB/s"
        text += f", up to {(self.total - self.done) / rate:,.0f} s to go"
        print(
            f"\r\033[K{text}" if self.live else text,
            end="" if self.live else "\n",
            file=sys.stderr,
            flush=True,
        )

    def end(self) -> None:
        if self.live:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def write_dataset(prefix: Path, files: list[Path], max_bytes: int, key: str, tokens: Tokens) -> int:
    """Write PREFIX.bin and PREFIX.idx, both or none; the number of tokens in them."""
    # Here, because it takes seconds, which neither --help nor a wrong path need wait for.
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix.parent.mkdir(parents=True, exist_ok=True)
    parts = {Path(f"{prefix}{end}.part"): Path(f"{prefix}{end}") for end in (".bin", ".idx")}
    data, index = parts
    count = 0
    try:
        builder = IndexedDatasetBuilder(str(data), dtype=tokens.dtype)
        progress = Progress(min(max_bytes, sum(path.stat().st_size for path in files)))
        for some in batched(documents(files, max_bytes, key), BATCH):
            encoded = tokens.encode([text for text, _ in some])
            for (_, cut), ids in zip(some, encoded, strict=True):
                document = np.append(np.asarray(ids, dtype=tokens.dtype), tokens.dtype(tokens.eod))
                step = PIECE if cut else document.size
                for start in range(0, document.size, step):
                    builder.add_item(torch.from_numpy(document[start : start + step].copy()))
                    builder.end_document()
                count += document.size
            progress.add(sum(len(text.encode()) for text, _ in some))
        progress.end()
        builder.finalize(str(index))
        if count < MIN_TOKENS:
            raise CorpusError(
                f"{len(files)} file(s) hold {count:,} tokens of UTF-8 text, too few to "
                f"train and validate on: give --text at least {MIN_TOKENS:,}"
            )
        parts[index].unlink(missing_ok=True)  # an old index would be of other data
        for part, whole in parts.items():
            os.replace(part, whole)
    finally:
        for part in parts:
            part.unlink(missing_ok=True)
    return count


def prepare(
    prefix: Path,
    text: list[Path],
    max_bytes: int | None = None,
    *,
    key: str = "text",
    tokens: Tokens = BYTES,
) -> int:
    """Write the dataset from the user's paths, or from the standard library when none is given."""
    files = user_files(text) if text else stdlib_sources()
    limit = max_bytes or (sys.maxsize if text else LIBRARY_BYTES)
    return write_dataset(prefix, files, limit, key, tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description="Text files to a Megatron dataset.")
    parser.add_argument("prefix", type=Path, help="write PREFIX.bin and PREFIX.idx")
    parser.add_argument(
        "--text",
        type=Path,
        nargs="+",
        default=[],
        metavar="PATH",
        help="files or folders (default: Python's standard library)",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="NAME",
        help="a Hugging Face tokenizer's name or folder (default: a token is a byte)",
    )
    parser.add_argument(
        "--json-key", default="text", help="field of .jsonl lines; default: %(default)s"
    )
    parser.add_argument(
        "--max-bytes",
        type=int,
        help=f"read so many bytes of text (default: all; {LIBRARY_BYTES:,} of the library)",
    )
    args = parser.parse_args()
    if args.max_bytes is not None and args.max_bytes <= 0:
        parser.error(f"--max-bytes {args.max_bytes}: must be positive")
    try:
        tokens = hugging_face(args.tokenizer) if args.tokenizer else BYTES
        count = prepare(args.prefix, args.text, args.max_bytes, key=args.json_key, tokens=tokens)
    except CorpusError as error:
        sys.exit(f"prepare_corpus: {error}")
    print(f"train with --data-path {args.prefix} {' '.join(tokens.flags)}")
    print(f"{args.prefix}.bin: {count:,} tokens")


if __name__ == "__main__":
    main()
