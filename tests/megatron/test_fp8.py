"""Weights in a supported FP8 train as in bf16, and any others are refused."""

import argparse
import importlib.util
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from megatron_runs import LAUNCHER, MODEL, NO_DROPOUT, PION, SCRIPT, launch, steps, train

from megatron_patches.parser import add_pion_arguments

RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")
# What Transformer Engine's is_..._available says of the GPU, for each recipe.
AVAILABLE = {
    "delayed": "is_fp8_available",
    "tensorwise": "is_fp8_available",
    "blockwise": "is_fp8_block_scaling_available",
    "mxfp8": "is_mxfp8_available",
    "nvfp4": "is_nvfp4_available",
}


def parse(**given: object) -> argparse.Namespace:
    """Pion's own part of the arguments, with what Megatron's parser would have made of others."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--optimizer", choices=["adam"])
    add_pion_arguments(parser)
    defaults = {
        "lr": 1e-2,
        "lr_warmup_init": 0.0,
        "save": None,
        "load": None,
        "bf16": True,
        "fp8": "hybrid",
    }
    return parser.parse_args(["--optimizer", "pion"], argparse.Namespace(**defaults | given))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("distributed", [False, True])
def test_bf16_weights_are_accepted(recipe: str, distributed: bool) -> None:
    parse(fp8_recipe=recipe, fp8_param_gather=False, use_distributed_optimizer=distributed)


@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_weights_are_accepted(recipe: str) -> None:
    parse(fp8_recipe=recipe, fp8_param_gather=True, use_distributed_optimizer=True)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"use_distributed_optimizer": False}, "needs --use-distributed-optimizer"),
        ({"fp4_param_gather": True}, "--fp4-param-gather"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_other_fp8_weights_are_refused(
    given: dict[str, object], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed = {"fp8_recipe": "delayed", "fp8_param_gather": True, "use_distributed_optimizer": True}
    with pytest.raises(SystemExit):
        parse(**fixed | given)
    assert says in capsys.readouterr().err


def test_fp8_weights_are_judged_before_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_patches import parameters, transformer_engine
    from pion_dist.classify import ParamInfo, Rotated
    from pion_dist.matrices import whole

    class Kept(torch.Tensor):
        """An FP8 weight, whose bytes say nothing without their scales."""

        def any(self, *_: object) -> torch.Tensor:
            raise AssertionError("it was read")

    def weight(name: str, initial: torch.Tensor | None) -> tuple[ParamInfo, torch.Tensor, Rotated]:
        kept = torch.zeros(4, 3).as_subclass(Kept)
        kept.get_high_precision_init_val = lambda: initial  # None once it is cleared
        return ParamInfo(name=name, shape=(4, 3)), kept, Rotated(whole(4, 3))

    monkeypatch.setattr(transformer_engine, "is_fp8", lambda p: isinstance(p, Kept))
    weights = [("zero", torch.zeros(4, 3)), ("other", torch.ones(4, 3)), ("cleared", None)]
    assert parameters._with_zeros([weight(*each) for each in weights]) == {"zero"}


@pytest.mark.slow
def test_megatron_takes_the_flags_with_pion(corpus: Path) -> None:
    # Layers that are not Transformer Engine's compute in bf16 all the same.
    flags = ["--bf16", "--fp8-format", "hybrid", "--fp8-recipe", "tensorwise"]
    assert len(train(corpus, *PION, *flags, "--exit-interval", "2")) == 2


# ------------------------------------------------------------------------------- on a GPU

# Sizes that FP8's matrix multiplications take; 2 x 128 tokens. Later flags win.
GPU = [
    *(*MODEL, *NO_DROPOUT, *PION, "--bf16"),
    *("--hidden-size", "256", "--ffn-hidden-size", "512", "--seq-length", "128"),
    *("--max-position-embeddings", "128", "--train-iters", "50"),
    *("--transformer-impl", "transformer_engine", "--distributed-backend", "nccl"),
]
LAST = 10  # iterations that are compared


def missing() -> str | None:
    """Why FP8 cannot be trained here."""
    if not torch.cuda.is_available():
        return "no GPU: FP8 trains on one only"
    if importlib.util.find_spec("transformer_engine") is None:
        return "no Transformer Engine: see docs/fp8.md"
    return None


@pytest.fixture(scope="module")
def on_gpu(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[float]]:
    """Trains 50 iterations on the GPU and returns their losses."""
    if reason := missing():
        pytest.skip(reason)
    data = ["--data-path", str(corpus), "--data-cache-path", str(tmp_path_factory.mktemp("data"))]

    def losses(*flags: str) -> list[float]:
        output = launch(SCRIPT, *GPU, *data, *flags, launcher=LAUNCHER, timeout=600)
        trained = [float(step.loss) for step in steps(output)]
        assert len(trained) == 50, output[-3000:]
        return trained

    return losses


@pytest.fixture(scope="module")
def in_bf16(on_gpu: Callable[..., list[float]]) -> list[float]:
    return on_gpu()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "weights"),
    [*((recipe, "bf16") for recipe in AVAILABLE), *((recipe, "fp8") for recipe in RECIPES)],
)
def test_fp8_trains_as_bf16(
    recipe: str,
    weights: str,
    on_gpu: Callable[..., list[float]],
    in_bf16: list[float],
    record_property: Callable[[str, object], None],
) -> None:
    import transformer_engine.pytorch as te

    available, why = getattr(te, AVAILABLE[recipe])(return_reason=True)
    if not available:
        pytest.skip(f"{recipe}: {why}")
    flags = ["--fp8-format", "hybrid", "--fp8-recipe", recipe]
    if recipe == "delayed":
        flags += ["--fp8-amax-history-len", "16", "--fp8-amax-compute-algo", "max"]
    if recipe == "nvfp4":
        flags = ["--fp4-format", "e2m1"]
    if weights == "fp8":
        flags += ["--use-distributed-optimizer", "--fp8-param-gather"]
    mine, theirs = (statistics.mean(x[-LAST:]) for x in (on_gpu(*flags), in_bf16))
    record_property(
        f"mean loss of the last {LAST} of 50 iterations, bf16 {theirs:.4f}",
        f"{recipe:10} {weights:4} weights {mine:.4f} ({mine / theirs - 1:+.2%})",
    )
    # The bound. FP8 rounds weights and activations by up to 2**-4 at random.
    assert abs(mine / theirs - 1) < 0.01
