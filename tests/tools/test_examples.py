"""The examples run as documented: Megatron launches, datasets, fine-tuning and reinforcement."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron_runs import ROOT, environment, steps

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


def example(name: str, *arguments: str | Path) -> list[str]:
    return [sys.executable, str(EXAMPLES / name), *map(str, arguments)]


# ---------------------------------------------------------------------------- Megatron


def launch(name: str, *flags: str, **more: str) -> str:
    """A launch's --smoke: it trains, and its validation loss is below the first one."""
    output = run([str(EXAMPLES / "megatron" / name), "--smoke", *flags], **more)
    trained = steps(output) or [None]
    first = re.search(r"iteration +1/.*lm loss: (\S+) ", output)
    last = re.search(r"validation loss at iteration 20 .*lm loss value: (\S+)", output)
    assert first and last and trained, output[-3000:]
    assert float(last[1]) < float(first[1])
    return output


@slow
def test_llama_60m_starts_and_runs_as_published(tmp_path: Path) -> None:
    weights = tmp_path / "initial.pt"
    output = launch("llama_60m.sh", "--pion-print-plan", "--save-initial", str(weights))
    assert "recipe paper-60m: " in output
    assert re.search(r"iteration +20/.* learning rate: 1\.0+E-05 ", output)
    layers = {n: p for n, p in torch.load(weights).items() if p.dim() == 2 and "layers" in n}
    assert len(layers) == 8
    for name, p in layers.items():  # output projections too, which Megatron starts at a half here
        # Standard deviation of n normal numbers: relative error 1/sqrt(2n), 5 of them; bf16.
        assert abs(p.float().std() / 0.02 - 1) < 5 / (2 * p.numel()) ** 0.5 + 2**-9, name


@slow
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("llama_1.3b.sh", "recipe paper-1.3b: "),
        ("qwen3_moe.sh", "recipe pretrain: "),
        ("norm_free.sh", "recipe pretrain: "),
    ],
)
def test_launches(name: str, says: str, corpus: Path) -> None:
    output = launch(name, "--pion-print-plan", DATA=str(corpus))
    assert says in output
    layers = [line for line in output.splitlines() if re.match(r"  decoder\S+ ", line)]
    if name == "qwen3_moe.sh":
        # 2 layers, 8 experts, 4 on each of 2 ranks, 2 weights.
        experts = [line for line in layers if "experts.local_experts" in line]
        assert len(experts) == 2 * 8 * 2 and all("Pion: " in line for line in experts)
    if name == "norm_free.sh":
        assert layers and not any("norm" in line for line in layers)


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
    python = tmp_path / "python"  # prints the command line of the launch
    python.write_text("#!/bin/bash\n[[ $1 == -c ]] || printf '%s\\n' \"$@\"\n")
    python.chmod(0o755)
    more = {"PYTHON": str(python), "DATA": str(tmp_path / "corpus"), "GPUS": "8"}
    words = run([str(EXAMPLES / "megatron" / name)], **more).split()
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


def test_a_hugging_face_tokenizer_s_dataset_is_megatron_s(texts: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="no transformers: pip install '.[examples]'")
    from hf import tiny_model
    from megatron.core.tokenizers import MegatronTokenizer

    tiny_model(tmp_path / "tiny")
    prefix = tmp_path / "corpus"
    folder = str(tmp_path / "tiny")
    command = example("prepare_corpus.py", prefix, "--text", texts, "--tokenizer", folder)
    assert f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {folder}" in run(command)
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
    pytest.importorskip("transformers", reason="no transformers: pip install '.[examples]'")


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


def stop(command: list[str], line: str, how: int) -> None:
    """Send a command a signal once it prints a line that begins so."""
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout is not None
        for printed in job.stdout:
            if printed.startswith(line):
                os.kill(job.pid, how)
    assert job.returncode != 0


def on_ranks(count: int, command: list[str]) -> list[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return [command[0], *torchrun, *command[1:]]


@slow
@pytest.mark.usefixtures("transformers")
def test_fine_tuning_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    def command(out: Path) -> list[str]:
        flags = ["--steps", "60", "--log-every", "1", "--save-every", "10"]
        return example("sft.py", "--smoke", "--out", out, *flags)

    straight = losses(run(command(tmp_path / "straight")))
    assert len(straight) == 60
    assert float(straight[60]) < 0.2 * float(straight[1])
    before = spectra(tmp_path / "straight" / "tiny")
    for name, now in spectra(tmp_path / "straight" / "model").items():
        # Rounding to float32 at each of 60 steps, 6e-8 of the weight's norm, which may add up.
        assert (now - before[name]).abs().max() < 60 * 1e-7 * before[name].max(), name
    stop(command(tmp_path / "killed"), "step 35/", signal.SIGKILL)
    resumed = losses(run(command(tmp_path / "killed")))
    # It was killed once step 35 was printed, and printing may have been ahead of it.
    first = min(resumed)
    assert first in (31, 41, 51)
    assert resumed == {step: loss for step, loss in straight.items() if step >= first}


@slow
@pytest.mark.usefixtures("transformers")
def test_fine_tuning_in_the_trainer_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    command = example("trainer.py", "--smoke", "--steps", "60", "--save-every", "30")
    last = tmp_path / "trainer" / "checkpoint-60"

    def history() -> dict[int, float]:
        """Losses by step, of this run and those that it goes on from."""
        run([*command, "--out", str(tmp_path)])
        logged = json.loads((last / "trainer_state.json").read_text())["log_history"]
        return {entry["step"]: entry["loss"] for entry in logged if "loss" in entry}

    straight = history()
    assert list(straight) == [10, 20, 30, 40, 50, 60] and straight[60] < 0.1 * straight[10]
    shutil.rmtree(last)
    before = spectra(tmp_path / "tiny")
    for name, now in spectra(tmp_path / "model").items():
        assert (now - before[name]).abs().max() < 60 * 1e-7 * before[name].max(), name
    assert history() == straight


@slow
@pytest.mark.usefixtures("transformers")
def test_fine_tuning_on_two_ranks(tmp_path: Path) -> None:
    """What a sharded run has saved goes on unsharded, to the losses of an unsharded run."""
    flags = ["--smoke", "--steps", "30", "--log-every", "1", "--save-every", "10", "--out"]
    straight = losses(run(on_ranks(2, example("sft.py", *flags, tmp_path / "straight"))))
    assert len(straight) == 30 and float(straight[30]) < 0.5 * float(straight[1])
    sharded = on_ranks(2, example("sft.py", "--shard", *flags, tmp_path / "stopped"))
    stop(sharded, "step 15/", signal.SIGTERM)  # at which torchrun stops its ranks
    resumed = losses(run(on_ranks(2, example("sft.py", *flags, tmp_path / "stopped"))))
    assert min(resumed) in (11, 21) and max(resumed) == 30
    for step, loss in resumed.items():
        assert float(loss) == pytest.approx(float(straight[step]), **SUMMED_OTHERWISE)


@slow
@pytest.mark.usefixtures("transformers")
@pytest.mark.parametrize("shard", [False, True], ids=["one-process", "two-shards"])
def test_reinforcement_raises_the_reward(tmp_path: Path, shard: bool) -> None:
    command = example("rl.py", "--smoke", "--out", tmp_path)
    output = run(on_ranks(2, [*command, "--shard"]) if shard else command)
    before, after = (
        float(re.search(rf"right {when}: (\S+)", output)[1]) for when in ("before", "after")
    )
    # Of a hundred sums about a third before, over four fifths after, seed by seed.
    assert after > before + 0.2, output


@slow
def test_a_loop_like_torchtitan_s_goes_on_in_another_layout(tmp_path: Path) -> None:
    """What FSDP2 has saved on two ranks goes on on one, to the losses of tensor parallelism."""
    command = example("titan.py", "--smoke", "--save-every", "10", "--out")
    straight = losses(run(on_ranks(2, [*command, str(tmp_path / "straight"), "--tp", "2"])))
    assert len(straight) == 30 and float(straight[30]) < 0.6 * float(straight[1])
    command.append(str(tmp_path / "stopped"))
    stop(on_ranks(2, command), "step 15/", signal.SIGTERM)
    resumed = losses(run(on_ranks(1, command)))
    assert min(resumed) in (11, 21) and max(resumed) == 30
    for step, loss in resumed.items():
        assert float(loss) == pytest.approx(float(straight[step]), **SUMMED_OTHERWISE)


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
    import titan

    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(sys, "argv", ["titan.py", *flags])
    with pytest.raises(SystemExit):
        titan.main()
    assert says in capsys.readouterr().err


@slow
@pytest.mark.parametrize("shard", [False, True], ids=["one-process", "two-shards"])
def test_lightning_goes_on_from_its_checkpoint(tmp_path: Path, shard: bool) -> None:
    """To the same losses; what FSDP2 has saved goes on by tensor parallelism, to rounding."""
    pytest.importorskip("lightning", reason="no lightning: pip install '.[examples]'")
    command = example("lightning_module.py", "--smoke", "--save-every", "20", "--out", tmp_path)
    straight = losses(run(on_ranks(2, command) if shard else command))
    assert len(straight) == 30 and float(straight[30]) < 0.6 * float(straight[1])
    resumed = losses(run(on_ranks(2, [*command, "--tp", "2"]) if shard else command))
    assert list(resumed) == list(range(21, 31))
    for step, loss in resumed.items():
        if shard:
            assert float(loss) == pytest.approx(float(straight[step]), **SUMMED_OTHERWISE)
        else:
            assert loss == straight[step]
