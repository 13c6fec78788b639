"""Pretrain a GPT with Megatron; every size and option comes from Megatron's own flags.

    python -m megatron_patches [--cpu] examples/pretrain_bytes.py \\
        --num-layers 4 --hidden-size 128 ... --data-path PREFIX  # PREFIX.bin from prepare_corpus.py

Bytes or any tokenizer that Megatron builds. Three flags are its own: --save-initial writes the
weights that training starts from, --norm-free leaves all normalisation layers out, and
--no-depth-scaled-init starts output projections with the standard deviation of the others.
"""

from argparse import ArgumentParser
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import core_transformer_config_from_args, parse_and_validate_args
from megatron.training.utils import get_blend_and_blend_per_split

CHUNKS: list[GPTModel] = []  # this rank's part of the model, for --save-initial


def add_arguments(parser: ArgumentParser) -> ArgumentParser:
    group = parser.add_argument_group("pretrain_bytes")
    group.add_argument(
        "--save-initial",
        metavar="FILE",
        help="torch.save the weights before the first step (one process)",
    )
    group.add_argument(
        "--norm-free",
        action="store_true",
        help="no normalisation layers (--transformer-impl local)",
    )
    group.add_argument(
        "--no-depth-scaled-init",
        action="store_true",
        help="start output projections with --init-method-std, not divided by sqrt(2 layers)",
    )
    return parser


def without_norms(spec: TransformerBlockSubmodules) -> TransformerBlockSubmodules:
    """The block's spec with nothing in place of its normalisation layers (modified in place)."""
    spec.layer_norm = None
    for layer in spec.layer_specs:
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = IdentityOp
    return spec


def model_provider(
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: Any = None,
    pg_collection: Any = None,
) -> GPTModel:
    args = get_args()
    config = config or core_transformer_config_from_args(args)
    if args.no_depth_scaled_init:
        config.output_layer_init_method = config.init_method
    spec = get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=args.transformer_impl == "transformer_engine",
        normalization=args.normalization,
        vp_stage=vp_stage,
    )
    if args.norm_free:
        if args.transformer_impl != "local":
            raise SystemExit("--norm-free needs --transformer-impl local: others fuse the norms")
        spec = without_norms(spec)
    model = GPTModel(
        config,
        spec,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        vp_stage=vp_stage,
        pg_collection=pg_collection,
    )
    CHUNKS.append(model)
    return model


def datasets_provider(sizes: list[int], vp_stage: int | None = None) -> list[GPTDataset | None]:
    args = get_args()
    if args.save_initial:  # Megatron asks for data once weights are initialised or loaded
        if args.world_size > 1:
            raise SystemExit("--save-initial holds one process's weights: use --save with more")
        weights = {name: p.detach().clone() for name, p in CHUNKS[0].named_parameters()}
        torch.save(weights, args.save_initial)
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        path_to_cache=args.data_cache_path,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
    )
    # Every rank reads its own batches: no broadcast, at the price of TP x PP times the reading.
    return BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()


def masked_loss(mask: torch.Tensor, losses: torch.Tensor) -> tuple[torch.Tensor, Any, Any]:
    loss = (losses.float() * mask).sum()
    tokens = mask.sum().int()
    return loss, tokens, {"lm loss": torch.stack([loss.detach(), tokens.float()])}


def forward_step(batches: Iterator[dict[str, torch.Tensor]], model: GPTModel) -> tuple[Any, Any]:
    batch = {name: value.cuda(non_blocking=True) for name, value in next(batches).items()}
    losses = model(
        batch["tokens"],
        batch["position_ids"],
        batch.get("attention_mask"),  # None lets the kernel make its causal mask
        labels=batch["labels"],
    )
    return losses, partial(masked_loss, batch["loss_mask"])


def main() -> None:
    cfg = pretrain_cfg_container_from_args(parse_and_validate_args(add_arguments))
    datasets_provider.is_distributed = True  # type: ignore[attr-defined]
    pretrain(  # by keyword: 0.18 has model_provider third, 0.19 fifth
        cfg,
        train_valid_test_dataset_provider=datasets_provider,
        model_type=ModelType.encoder_or_decoder,
        forward_step_func=forward_step,
        model_provider=model_provider,
    )


if __name__ == "__main__":
    main()
