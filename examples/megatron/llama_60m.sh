#!/usr/bin/env bash
# Llama 60M with Pion, as published (arXiv 2605.12492), or with this package's defaults:
#
#     examples/megatron/llama_60m.sh --smoke            # a tiny one, on the CPU
#     DATA=corpus TOKENIZER=folder examples/megatron/llama_60m.sh [MEGATRON'S FLAGS]
#     RECIPE=pretrain DATA=... examples/megatron/llama_60m.sh
#
# launch.sh says what else the environment sets.
set -euo pipefail

# 60M is 25M in the layers and the rest in 2 x 512 x a vocabulary of 32,100: T5's, on C4.
MODEL_ARGS=(
    --num-layers 8
    --hidden-size 512
    --ffn-hidden-size 1376
    --num-attention-heads 8
    --seq-length 256
    --max-position-embeddings 256
    --position-embedding-type rope
    --normalization RMSNorm
    --norm-epsilon 1e-6
    --swiglu
    --disable-bias-linear
    --untie-embeddings-and-output-weights
    --attention-dropout 0
    --hidden-dropout 0
)
TRAIN_ARGS=(
    --global-batch-size 512
    --micro-batch-size 64
    --train-iters 73242 # of 512 x 256 tokens: 9.6B
    --clip-grad 1.0
    --adam-beta1 0.9 --adam-beta2 0.95 --weight-decay 0.1 # of Adam's parameters alone
    --bf16 # with float32 masters, as published
    --split 99,1,0
    --eval-interval 1000
    --eval-iters 20
    --log-interval 10
    --save-interval 5000
    --ckpt-format torch_dist
)
SCRIPT_ARGS=()
case ${RECIPE:=paper-60m} in
paper-60m)
    OPTIMIZER_ARGS=(
        --optimizer pion
        --pion-recipe paper-60m
        --lr 1e-3 --min-lr 1e-5 --lr-decay-style cosine # without warm-up
        --init-method-std 0.02
    )
    SCRIPT_ARGS=(--no-depth-scaled-init) # 0.02 in output projections too
    ;;
pretrain)
    # A first guess, tuned nowhere: Pion's learning rates are AdamW's and Muon's.
    OPTIMIZER_ARGS=(
        --optimizer pion
        --pion-recipe pretrain
        --lr 3e-3 --min-lr 3e-4
        --lr-decay-style cosine --lr-warmup-fraction 0.02
    )
    ;;
*)
    echo "RECIPE=$RECIPE: must be paper-60m or pretrain" >&2
    exit 1
    ;;
esac
SMOKE_PROCESSES=1
SMOKE_ARGS=(
    --num-layers 2 --hidden-size 64 --ffn-hidden-size 172 --num-attention-heads 4
    --seq-length 64 --max-position-embeddings 64 --global-batch-size 8 --micro-batch-size 8
)
source "$(dirname "$0")/launch.sh"
