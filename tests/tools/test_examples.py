"""The examples run as documented: Megatron launches, datasets, fine-tuning and reinforcement."""

import ast
import importlib.util
import json
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TextIO

import numpy as np
import pytest
import torch
from megatron_runs import FORKS, LIMIT_S, ROOT, environment, steps

EXAMPLES = ROOT / "examples"
sys.path.insert(0, str(EXAMPLES))

import prepare_corpus  # noqa: E402

from pion_dist import Pion, split_parameters  # noqa: E402

slow = pytest.mark.slow
LOSS = re.compile(r"step (\d+)/\d+  loss (\S+)")
# Of losses printed with 6 decimals, from gradients summed in another order, in float32.
SUMMED_OTHERWISE = {"rel": 1e-4, "abs": 1e-6}


def run(command: list[str], **more: str) -> str:
    """What a command prints that must succeed."""
    done = subprocess.run(
        command,
        env={**environment(), "PYTHON": sys.executable, **more},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def needs(package: str) -> None:
    """Skip a test without a package, which this process need not import."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"no {package}: pip install '.[examples]'")


# ---------------------------------------------------------------------------- Megatron


def command_line(folder: Path, name: str, *flags: str, **more: str) -> list[str]:
    """The words with which a launch calls Python for the training."""
    python = folder / "python"
    python.write_text("#!/bin/bash\n[[ $1 == -c ]] || printf '%s\\n' \"$@\"\n")
    python.chmod(0o755)
    launch = str(EXAMPLES / "megatron" / name)
    return run([launch, *flags], **{**more, "PYTHON": str(python)}).splitlines()


def smoke(folder: Path, corpus: Path, name: str, *flags: str, processes: int) -> str:
    """What a launch's --smoke prints, in one process that need not import Megatron again.

    Of more processes it is the first alone, with all the data.
    """
    words = command_line(folder, name, "--smoke", *flags, DATA=str(corpus))
    assert words[words.index("--nproc-per-node") + 1] == str(processes)
    code, output = FORKS.run(*words[words.index("megatron_patches") + 1 :])
    assert code == 0, output[-8000:]
    return assert_learns(output)


def assert_learns(output: str) -> str:
    """A run trains, and its validation loss is below the first one; what it printed."""
    first = re.search(r"iteration +1/.*lm loss: (\S+) ", output)
    last = re.search(r"validation loss at iteration 20 .*lm loss value: (\S+)", output)
    assert first and last and steps(output), output[-3000:]
    assert float(last[1]) < float(first[1])
    return output


def layers(output: str) -> list[str]:
    """The lines of a printed plan on the layers' weights."""
    return [line for line in output.splitlines() if re.match(r"  decoder\S+ ", line)]


@slow
def test_llama_60m_runs_as_published(corpus: Path, tmp_path: Path) -> None:
    weights = tmp_path / "initial.pt"
    flags = ("--pion-print-plan", "--save-initial", str(weights))
    output = smoke(tmp_path, corpus, "llama_60m.sh", *flags, processes=1)
    assert "recipe paper-60m: " in output
    assert re.search(r"iteration +20/.* learning rate: 1\.0+E-05 ", output)
    matrices = {n: p for n, p in torch.load(weights).items() if p.dim() == 2 and "layers" in n}
    assert len(matrices) == 8
    for name, p in matrices.items():  # output projections too, which Megatron starts at a half here
        # Standard deviation of n normal numbers: relative error 1/sqrt(2n), 5 of them; bf16.
        assert abs(p.float().std() / 0.02 - 1) < 5 / (2 * p.numel()) ** 0.5 + 2**-9, name


@slow
def test_llama_1_3b_runs(corpus: Path, tmp_path: Path) -> None:
    """Its two ranks with overlap are among the trainings of test_layouts.py."""
    output = smoke(tmp_path, corpus, "llama_1.3b.sh", "--pion-print-plan", processes=2)
    assert "recipe paper-1.3b: " in output


@slow
def test_norm_free_runs_without_norms(corpus: Path, tmp_path: Path) -> None:
    output = smoke(tmp_path, corpus, "norm_free.sh", "--pion-print-plan", processes=1)
    assert "recipe pretrain: " in output
    assert layers(output) and not any("norm" in line for line in layers(output))


@slow
def test_a_mixture_of_experts_starts_as_documented() -> None:
    """The whole launch: it makes its data, and torchrun starts two ranks."""
    launch = str(EXAMPLES / "megatron" / "qwen3_moe.sh")
    output = assert_learns(run([launch, "--smoke", "--pion-print-plan"]))
    assert "recipe pretrain: " in output
    # 2 layers, 8 experts, 4 on each of 2 ranks, 2 weights.
    experts = [line for line in layers(output) if "experts.local_experts" in line]
    assert len(experts) == 2 * 8 * 2 and all("Pion: " in line for line in experts)


PUBLISHED = {  # docs/results.md
    "llama_60m.sh": {
        **{"num-layers": 8, "hidden-size": 512, "ffn-hidden-size": 1376, "num-attention-heads": 8},
        **{"train-iters": 9_600_000_000 // (512 * 256), "lr": 1e-3, "min-lr": 1e-5},
        "pion-recipe": "paper-60m",
    },
    "llama_1.3b.sh": {
        **{"num-layers": 24, "hidden-size": 2048, "ffn-hidden-size": 5460},
        **{"num-attention-heads": 32, "train-iters": 54_000_000_000 // (512 * 256)},
        **{"lr": 5e-4, "min-lr": 5e-6, "pion-recipe": "paper-1.3b"},
    },
}
PUBLISHED_IN_COMMON = {
    **{"optimizer": "pion", "global-batch-size": 512, "seq-length": 256, "clip-grad": 1.0},
    **{"lr-decay-style": "cosine", "init-method-std": 0.02, "weight-decay": 0.1},
    **{"adam-beta1": 0.9, "adam-beta2": 0.95, "norm-epsilon": 1e-6},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings(name: str, tmp_path: Path) -> None:
    for end in (".bin", ".idx"):
        (tmp_path / f"corpus{end}").touch()
    words = command_line(tmp_path, name, DATA=str(tmp_path / "corpus"), GPUS="8")
    for flag, value in {**PUBLISHED_IN_COMMON, **PUBLISHED[name]}.items():
        assert words.count(f"--{flag}") == 1, flag
        given = words[words.index(f"--{flag}") + 1]
        assert given == value if isinstance(value, str) else float(given) == value, flag
    assert {"--swiglu", "--untie-embeddings-and-output-weights"} <= set(words)
    assert {"--bf16", "--no-depth-scaled-init"} <= set(words)
    assert not any(word.startswith("--lr-warmup") for word in words)


@slow
@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"DATA": "nowhere"}, "DATA=nowhere: no .bin and .idx"),
        ({"RECIPE": "paper"}, "must be paper-60m or pretrain"),
        ({"MEGATRON": "nowhere"}, "MEGATRON=nowhere: no pretrain_gpt.py"),
    ],
)
def test_a_launch_says_what_is_missing(more: dict[str, str], says: str) -> None:
    done = subprocess.run(
        [EXAMPLES / "megatron" / "llama_60m.sh"],
        env={**environment(), "PYTHON": sys.executable, **more},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and says in done.stderr, done.stderr


# ---------------------------------------------------------------------------- data


def dataset(prefix: Path) -> list[np.ndarray]:
    """What Megatron reads back."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    stored = IndexedDataset(str(prefix))
    return [stored[i].copy() for i in range(len(stored))]  # which it has mapped


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder of a text, records, and what is to be left out."""
    folder = tmp_path / "texts"
    (folder / "more").mkdir(parents=True)
    (folder / "book.txt").write_text("Grüße, a long text. " * 8000)
    lines = [f'{{"text": "record {i}", "other": 1}}\n\n' for i in range(3)]
    (folder / "more" / "records.jsonl").write_text("".join(lines))
    (folder / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\x00\xff")
    (folder / ".hidden").write_text("hidden")
    return folder


def test_bytes_of_texts_and_records(texts: Path, tmp_path: Path) -> None:
    prefix = tmp_path / "corpus"
    count = prepare_corpus.prepare(prefix, [texts])
    documents = dataset(prefix)
    assert sum(each.size for each in documents) == count
    whole = b"".join(each.tobytes() for each in documents)
    book = (texts / "book.txt").read_bytes() + b"\0"
    assert sorted(whole.split(b"\0")) == sorted(
        [b"", book[:-1], b"record 0", b"record 1", b"record 2"]
    )
    pieces = [each.size for each in documents if each.size > 20]
    assert pieces == [prepare_corpus.PIECE] * (len(book) // prepare_corpus.PIECE) + [
        len(book) % prepare_corpus.PIECE
    ]


def test_a_hugging_face_tokenizer_s_dataset_is_megatron_s(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    needs("transformers")
    from hf import tiny_model
    from megatron.core.tokenizers import MegatronTokenizer

    tiny_model(tmp_path / "tiny")
    prefix = tmp_path / "corpus"
    folder = str(tmp_path / "tiny")
    words = ["prepare_corpus.py", str(prefix), "--text", str(texts), "--tokenizer", folder]
    monkeypatch.setattr(sys, "argv", words)
    prepare_corpus.main()
    flags = f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {folder}"
    assert flags in capsys.readouterr().out
    metadata = {"library": "huggingface"}
    megatron = MegatronTokenizer.from_pretrained(tokenizer_path=folder, metadata_path=metadata)
    documents = dataset(prefix)
    assert documents[0].dtype == np.uint16
    records = [each for each in documents if each.size < 20]
    assert [each[-1] for each in records] == [megatron.eod] * 3
    assert [megatron.detokenize(each[:-1].tolist()) for each in records] == [
        f"record {i}" for i in range(3)
    ]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"text": "a"}\n{"text": 1}\n', "line 2: 'text' is not a text"),
        ('{"content": "a"}\n', "line 1: no JSON object with a field 'text' (--json-key)"),
        ("[1]\n", "line 1: no JSON object"),
        ('{"text": "a"}\n', "too few to train"),
    ],
)
def test_a_failure_names_the_line_and_leaves_the_old_dataset(
    texts: Path, tmp_path: Path, content: str, says: str
) -> None:
    prefix = tmp_path / "data" / "corpus"
    prepare_corpus.prepare(prefix, [texts])
    before = {path.name: path.read_bytes() for path in prefix.parent.iterdir()}
    (tmp_path / "bad.jsonl").write_text(content)
    with pytest.raises(prepare_corpus.CorpusError) as error:
        prepare_corpus.prepare(prefix, [tmp_path / "bad.jsonl"])
    assert says in str(error.value)
    assert {path.name: path.read_bytes() for path in prefix.parent.iterdir()} == before


# ---------------------------------------------------------------------------- plain PyTorch


@pytest.fixture
def transformers() -> None:
    needs("transformers")


def test_pairs_are_lines_and_nothing_else_that_separates(tmp_path: Path) -> None:
    """A text may have U+2028 in it; blank lines are no records, but they count."""
    needs("transformers")
    from hf import read_pairs

    path = tmp_path / "pairs.jsonl"
    pairs = [("a\u2028b", "c\u0085d"), ("e\x1cf", "g\u2029")]
    lines = [json.dumps({"prompt": p, "response": r}, ensure_ascii=False) for p, r in pairs]
    path.write_text("\n  \n".join(lines) + "\n\n", encoding="utf-8")
    assert read_pairs(path) == pairs
    with path.open("a", encoding="utf-8") as file:
        file.write('{"prompt": "no response"}\n')
    with pytest.raises(SystemExit, match="line 5: must be an object with prompt and response"):
        read_pairs(path)


def losses(output: str) -> dict[int, str]:
    return {int(step): loss for step, loss in LOSS.findall(output)}


@pytest.mark.usefixtures("transformers")
def test_matrices_of_hugging_face_models() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    small = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=11, num_hidden_layers=2, **small))
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=2, n_positions=8))
    attention = [f"self_attn.{x}_proj" for x in "qkvo"]
    layer = [*attention, *(f"mlp.{x}_proj" for x in ("gate", "up", "down"))]
    assert [name for name, _ in split_parameters(llama)[0]] == [
        f"model.layers.{i}.{name}.weight" for i in range(2) for name in layer
    ]
    assert [name for name, _ in split_parameters(gpt2)[0]] == [
        f"transformer.h.0.{name}.weight"
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]


@pytest.mark.usefixtures("transformers")
def test_fused_experts_of_hugging_face_models_are_a_matrix_each() -> None:
    from transformers import GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM

    small = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2}
    small |= {"num_key_value_heads": 2, "num_local_experts": 4, "head_dim": 4}
    for model in (
        MixtralForCausalLM(MixtralConfig(vocab_size=11, num_hidden_layers=1, **small)),
        GptOssForCausalLM(GptOssConfig(vocab_size=11, num_hidden_layers=1, **small)),
    ):
        matrices, others = split_parameters(model)
        names = {name for name, _ in matrices}
        experts = {f"model.layers.0.mlp.experts.{x}_proj" for x in ("gate_up", "down")}
        assert experts <= names, names
        assert all(
            p.dim() == 1 or "bias" in name or "embed" in name or "lm_head" in name
            for name, p in others
        )
        optimizer = Pion(matrices)
        seen = {name.partition(":")[0] for name, _ in optimizer.matrices()}
        counts = {n: sum(m.startswith(n) for m, _ in optimizer.matrices()) for n in experts}
        assert seen == names and set(counts.values()) == {4}


def spectra(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    weights = load_file(folder / "model.safetensors")
    return {n: torch.linalg.svdvals(w.double()) for n, w in weights.items() if "_proj" in n}


# A process of these has imported what takes longer than most runs; each rank is a fork of it.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "lightning.pytorch.strategies",
        "torch.distributed.checkpoint.state_dict",
        "torch.distributed.fsdp",
        "torch.distributed.tensor.parallel",
        "transformers.models.auto.modeling_auto",
        "transformers.models.llama.modeling_llama",
        "transformers.trainer",
        "pytest",
        "psutil",
    ]
)


class Killing:
    """A stream that kills its process once a line is printed that begins so."""

    def __init__(self, stream: TextIO, line: str) -> None:
        self.stream, self.line = stream, line

    def write(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()
        if text.startswith(self.line):
            os.kill(os.getpid(), signal.SIGKILL)

    def flush(self) -> None:
        self.stream.flush()


def as_rank(words: list[str], ranks: dict[str, str], printed: Path, killed_at: str) -> None:
    """Run an example in this process, as one of torchrun's if there are ranks."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    os.environ.update(ranks)
    torch.set_num_threads(1)
    file = printed.open("a")
    for number in (1, 2):
        os.dup2(file.fileno(), number)
    sys.stdout = sys.stderr = Killing(file, killed_at) if killed_at else file
    sys.argv = words
    runpy.run_path(str(EXAMPLES / words[0]), run_name="__main__")


def forked(
    printed: Path, name: str, *arguments: str | Path, ranks: int = 0, killed_at: str = ""
) -> str:
    """What an example prints, alone or on ranks; it succeeds, or is killed at a line."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GROUP_RANK": "0"}
    shared |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    shared |= {"TORCHELASTIC_RUN_ID": "none"}  # from which Lightning knows torchrun
    each = [{**shared, "RANK": str(i), "LOCAL_RANK": str(i)} for i in range(ranks)] or [{}]
    words = [name, *map(str, arguments)]
    printed.unlink(missing_ok=True)
    jobs = [SERVER.Process(target=as_rank, args=(words, rank, printed, killed_at)) for rank in each]
    for job in jobs:
        job.start()
    jobs[0].join(LIMIT_S)
    for job in jobs:
        if killed_at:  # as torchrun does when a rank has died
            job.kill()
        job.join(LIMIT_S)
    codes = [job.exitcode for job in jobs]
    for job in jobs:
        job.kill()
    text = printed.read_text()
    assert codes == [-signal.SIGKILL if killed_at else 0] * len(jobs), f"{words}\n{text[-4000:]}"
    return text


def assert_same(resumed: dict[int, str], straight: dict[int, str], taken: range) -> None:
    """Losses of some steps are those of a run in another layout."""
    assert list(resumed) == list(taken)
    for step, loss in resumed.items():
        assert float(loss) == pytest.approx(float(straight[step]), **SUMMED_OTHERWISE)


SFT = ("--smoke", "--steps", "40", "--log-every", "1", "--save-every", "10", "--out")


@pytest.fixture(scope="module")
def fine_tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a fine-tuning in one process, which was not stopped."""
    needs("transformers")
    folder = tmp_path_factory.mktemp("sft")
    forked(folder / "printed", "sft.py", *SFT, folder)
    return folder


@slow
def test_fine_tuning_goes_on_where_it_was_killed(fine_tuned: Path, tmp_path: Path) -> None:
    straight = losses((fine_tuned / "printed").read_text())
    assert list(straight) == list(range(1, 41))
    assert float(straight[40]) < 0.3 * float(straight[1])
    before = spectra(fine_tuned / "tiny")
    for name, now in spectra(fine_tuned / "model").items():
        # Rounding to float32 at each of 40 steps, 6e-8 of the weight's norm, which may add up.
        assert (now - before[name]).abs().max() < 40 * 1e-7 * before[name].max(), name
    forked(tmp_path / "printed", "sft.py", *SFT, tmp_path, killed_at="step 25/")
    checkpoint = tmp_path / "checkpoint"
    checkpoint.rename(tmp_path / "checkpoint.last")  # as if killed while it was replaced
    resumed = losses(forked(tmp_path / "printed", "sft.py", *SFT, tmp_path))
    assert resumed == {step: loss for step, loss in straight.items() if step > 20}
    written = {path: path.stat().st_mtime_ns for path in checkpoint.iterdir()}
    assert not losses(forked(tmp_path / "printed", "sft.py", *SFT, tmp_path))  # it was finished
    assert written == {path: path.stat().st_mtime_ns for path in checkpoint.iterdir()}


@slow
def test_fine_tuning_goes_on_with_other_ranks(fine_tuned: Path, tmp_path: Path) -> None:
    """From 2 ranks to 2 shards to one process, to the losses of one process."""
    straight = losses((fine_tuned / "printed").read_text())
    ranks = forked(tmp_path / "a", "sft.py", *SFT, tmp_path, ranks=2, killed_at="step 15/")
    flags = ("--shard", *SFT, tmp_path)
    shards = forked(tmp_path / "b", "sft.py", *flags, ranks=2, killed_at="step 25/")
    # The rates are the checkpoint's, and the steps are those of the epochs.
    data = ("--model", tmp_path / "tiny", "--data", tmp_path / "sums.jsonl", "--out", tmp_path)
    flags = ("--batch", "20", "--epochs", "8", "--lr", "1", "--adam-lr", "1", "--log-every", "1")
    alone = forked(tmp_path / "c", "sft.py", *data, *flags)
    assert_same(losses(ranks), straight, range(1, 16))
    assert_same(losses(shards), straight, range(11, 26))
    assert_same(losses(alone), straight, range(21, 41))


@slow
@pytest.mark.usefixtures("transformers")
def test_fine_tuning_in_the_trainer_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    flags = ("--smoke", "--steps", "40", "--save-every", "20", "--out", tmp_path)
    last = tmp_path / "trainer" / "checkpoint-40"

    def history(ranks: int) -> dict[int, float]:
        """Losses by step, of this run and those that it goes on from."""
        forked(tmp_path / "printed", "trainer.py", *flags, ranks=ranks)
        logged = json.loads((last / "trainer_state.json").read_text())["log_history"]
        return {entry["step"]: entry["loss"] for entry in logged if "loss" in entry}

    straight = history(0)
    assert list(straight) == [10, 20, 30, 40] and straight[40] < 0.2 * straight[10]
    shutil.rmtree(last)
    before = spectra(tmp_path / "tiny")
    for name, now in spectra(tmp_path / "model").items():
        assert (now - before[name]).abs().max() < 40 * 1e-7 * before[name].max(), name
    assert history(0) == straight
    shutil.rmtree(last)
    assert history(2) == pytest.approx(straight, **SUMMED_OTHERWISE)


def refused(
    name: str, flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    """What an example that must not start prints."""
    for variable in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(sys, "argv", [name, *flags])
    with pytest.raises(SystemExit):
        importlib.import_module(name.removesuffix(".py")).main()
    return capsys.readouterr().err


@pytest.mark.usefixtures("transformers")
@pytest.mark.parametrize(
    ("name", "flags", "says"),
    [
        ("sft.py", ["--shard", "--smoke"], "--shard divides the model over ranks"),
        ("sft.py", [], "give --model and --data, or --smoke"),
        ("sft.py", ["--batch", "0"], "--batch 0: must be a positive multiple of 1"),
        ("trainer.py", ["--shard", "--smoke"], "--shard is of sft.py"),
        ("trainer.py", ["--batch", "-1"], "--batch -1: must be a positive multiple of 1"),
    ],
)
def test_fine_tuning_says_what_does_not_fit(
    name: str,
    flags: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "--batch" in flags:
        flags = [*flags, "--model", "model", "--data", "data", "--out", str(tmp_path)]
    assert says in refused(name, flags, monkeypatch, capsys)


@pytest.mark.usefixtures("transformers")
def test_a_batch_that_ranks_do_not_divide_is_refused_with_one_that_they_do(
    capsys: pytest.CaptureFixture[str],
) -> None:
    import sft

    parser = sft.arguments(sft.__doc__)
    assert sft.divided(parser, 9, 3) == 3
    for batch, ranks, fits in ((9, 2, 8), (3, 8, 8)):
        with pytest.raises(SystemExit):
            sft.divided(parser, batch, ranks)
        says = capsys.readouterr().err
        assert f"--batch {batch}: must be a positive multiple of {ranks} (the ranks" in says
        assert f"give --batch {fits}" in says


@slow
@pytest.mark.parametrize("name", ["trainer.py", "lightning_module.py"])
def test_help_of_borrowed_options_begins_with_the_script_s_own_line(
    name: str, tmp_path: Path
) -> None:
    for needed in ("transformers", "lightning"):
        needs(needed)
    doc = ast.get_docstring(ast.parse((EXAMPLES / name).read_text()))
    assert doc
    printed = forked(tmp_path / "printed", name, "--help")
    assert doc.partition("\n")[0] in " ".join(printed.split())


@slow
@pytest.mark.usefixtures("transformers")
@pytest.mark.parametrize("shard", [False, True], ids=["one-process", "two-shards"])
def test_reinforcement_raises_the_reward(tmp_path: Path, shard: bool) -> None:
    more = ("--shard", "--prompts", "16") if shard else ()  # 32 a step, as in one process
    flags = ("--smoke", "--out", tmp_path, *more)
    output = forked(tmp_path / "printed", "rl.py", *flags, ranks=2 if shard else 0)
    before, after = (
        float(re.search(rf"right {when}: (\S+)", output)[1]) for when in ("before", "after")
    )
    # Before, 32 of a hundred sums are right; afterwards 62 to 71 (three seeds, one process).
    assert after > before + 0.2, output


PRETRAINING = ("--smoke", "--steps", "20", "--save-every")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """The losses of a loop like torchtitan's, on one rank and not stopped."""
    folder = tmp_path_factory.mktemp("titan")
    flags = (*PRETRAINING, "20", "--out", folder)
    straight = losses(forked(folder / "printed", "titan.py", *flags, ranks=1))
    assert list(straight) == list(range(1, 21))
    assert float(straight[20]) < 0.7 * float(straight[1])
    return straight


@slow
def test_a_loop_like_torchtitan_s_goes_on_in_another_layout(
    pretrained: dict[int, str], tmp_path: Path
) -> None:
    """From FSDP2 to one rank to tensor parallelism, to the losses of one rank."""
    flags = (*PRETRAINING, "5", "--out", tmp_path)
    shards = forked(tmp_path / "a", "titan.py", *flags, ranks=2, killed_at="step 8/")
    assert_same(losses(shards), pretrained, range(1, 9))
    # The rates are the checkpoint's.
    one = forked(tmp_path / "b", "titan.py", *flags, "--lr", "1", ranks=1, killed_at="step 13/")
    assert_same(losses(one), pretrained, range(6, 14))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = [str(EXAMPLES / "titan.py"), *map(str, flags), "--tp", "2"]
    end = run([*torchrun, "--nproc-per-node", "2", *script])
    assert_same(losses(end), pretrained, range(11, 21))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--tp", "3"], "--tp 3: must divide the 1 ranks"),
        (["--batch", "0"], "--batch 0: must be a positive multiple of 1"),
        ([], "start it with torchrun"),
    ],
)
def test_a_loop_like_torchtitan_s_says_what_does_not_fit(
    flags: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert says in refused("titan.py", flags, monkeypatch, capsys)


@slow
@pytest.mark.parametrize("shard", [False, True], ids=["one-process", "two-shards"])
def test_lightning_goes_on_from_its_checkpoint(
    pretrained: dict[int, str], tmp_path: Path, shard: bool
) -> None:
    """To the losses of a loop like torchtitan's; from FSDP2 to tensor parallelism."""
    needs("lightning")
    flags = (*PRETRAINING, "15", "--out", tmp_path)
    ranks = 2 if shard else 0
    straight = losses(forked(tmp_path / "a", "lightning_module.py", *flags, ranks=ranks))
    assert_same(straight, pretrained, range(1, 21))
    flags += ("--tp", "2") if shard else ()
    flags += ("--lr", "1")  # the rates are the checkpoint's
    resumed = losses(forked(tmp_path / "b", "lightning_module.py", *flags, ranks=ranks))
    assert_same(resumed, pretrained, range(16, 21))
    if not shard:
        assert resumed == {step: straight[step] for step in resumed}
