"""Turn text files into Megatron's indexed dataset (PREFIX.bin, PREFIX.idx), one token a byte.

    python examples/prepare_corpus.py PREFIX                     # Python's own standard library
    python examples/prepare_corpus.py PREFIX --text book.txt notes/

Train with `--data-path PREFIX` and TOKENIZER_FLAGS. A file ends with a NUL byte, which text does
not contain. Megatron cuts the validation set off the end (`--split`): files are therefore
shuffled, always in the same way, and a file is either on one side or on both in one piece each.
"""

import argparse
import codecs
import random
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np

EOD = 0
TOKENIZER_FLAGS = [
    *("--tokenizer-type", "NullTokenizer", "--vocab-size", "256"),
    *("--null-tokenizer-eod-id", str(EOD), "--make-vocab-size-divisible-by", "64"),
]
# Megatron splits by documents, not by tokens: pieces of one size make the two agree, and let a
# single book be split at all.
PIECE_BYTES = 16 * 1024
MIN_BYTES = 8 * PIECE_BYTES  # below this a split such as 9:1 leaves no piece for validation
# Tests, vendored packages and tables are not what the rest of the library looks like.
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "encodings", "_vendor"}


class CorpusError(Exception):
    """What is wrong with the text and what to do about it, for the user."""


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


def read_text(path: Path, limit: int) -> bytes:
    """The file's first bytes; none when they are not UTF-8 text."""
    try:
        with path.open("rb") as file:
            data = file.read(limit)
        codecs.getincrementaldecoder("utf-8")().decode(data)  # the limit may cut a character
    except UnicodeDecodeError:
        return b""
    except OSError as error:
        raise CorpusError(f"cannot read {path}: {error.strerror}") from error
    return b"" if EOD in data else data


def texts(files: list[Path], max_bytes: int) -> Iterator[bytes]:
    """The files' contents in a fixed random order, non-text left out, max_bytes in all."""
    left = max_bytes
    for path in random.Random(0).sample(files, len(files)):
        if left and (data := read_text(path, left)):
            yield data
            left -= len(data)


def write_dataset(prefix: Path, files: list[Path], max_bytes: int) -> int:
    """Write PREFIX.bin and PREFIX.idx; the number of tokens in them."""
    # Here, because it takes seconds, which neither --help nor a wrong path need wait for.
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix.parent.mkdir(parents=True, exist_ok=True)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint8)
    tokens = 0
    for text in texts(files, max_bytes):
        document = np.frombuffer(text + bytes([EOD]), dtype=np.uint8)
        for start in range(0, document.size, PIECE_BYTES):
            builder.add_item(torch.from_numpy(document[start : start + PIECE_BYTES].copy()))
            builder.end_document()
        tokens += document.size
    builder.finalize(f"{prefix}.idx")
    if tokens < MIN_BYTES:
        raise CorpusError(
            f"{len(files)} file(s) hold {tokens:,} bytes of UTF-8 text, too few to "
            f"train and validate on: give --text at least {MIN_BYTES:,}"
        )
    return tokens


def prepare(prefix: Path, text: list[Path], max_bytes: int) -> int:
    """Write the dataset from the user's paths, or from the standard library when none is given."""
    return write_dataset(prefix, user_files(text) if text else stdlib_sources(), max_bytes)


def main() -> None:
    parser = argparse.ArgumentParser(description="Text files to a byte-level Megatron dataset.")
    parser.add_argument("prefix", type=Path, help="write PREFIX.bin and PREFIX.idx")
    parser.add_argument(
        "--text",
        type=Path,
        nargs="+",
        default=[],
        metavar="PATH",
        help="files or folders (default: Python's standard library)",
    )
    parser.add_argument("--max-bytes", type=int, default=8_000_000, help="default: %(default)s")
    args = parser.parse_args()
    try:
        tokens = prepare(args.prefix, args.text, args.max_bytes)
    except CorpusError as error:
        sys.exit(f"prepare_corpus: {error}")
    print(f"{args.prefix}.bin: {tokens:,} tokens")


if __name__ == "__main__":
    main()
