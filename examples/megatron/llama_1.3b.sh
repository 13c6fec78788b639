#!/usr/bin/env bash
# Llama 1.3B with Pion, as published (arXiv 2605.12492), or with this package's defaults:
#
#     examples/megatron/llama_1.3b.sh --smoke           # a tiny one, on the CPU
#     DATA=corpus TOKENIZER=folder examples/megatron/llama_1.3b.sh [MEGATRON'S FLAGS]
#     RECIPE=pretrain DATA=... examples/megatron/llama_1.3b.sh
#
# launch.sh says what else the environment sets.
set -euo pipefail

# 1.2B in the layers, 2 x 2048 x a vocabulary of 32,100 outside: T5's, on C4.
MODEL_ARGS=(
    --num-layers 24
    --hidden-size 2048
    --ffn-hidden-size 5460
    --num-attention-heads 32
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
    --micro-batch-size 16
    --train-iters 411987 # of 512 x 256 tokens: 54B
    --clip-grad 1.0
    --adam-beta1 0.9 --adam-beta2 0.95 --weight-decay 0.1 # of Adam's parameters alone
    --bf16 # the published run had no float32 masters; Megatron keeps them
    --use-distributed-optimizer
    --overlap-grad-reduce
    --overlap-param-gather
    --split 99,1,0
    --eval-interval 1000
    --eval-iters 20
    --log-interval 10
    --save-interval 5000
    --ckpt-format torch_dist
)
SCRIPT_ARGS=()
case ${RECIPE:=paper-1.3b} in
paper-1.3b)
    OPTIMIZER_ARGS=(
        --optimizer pion
        --pion-recipe paper-1.3b
        --lr 5e-4 --min-lr 5e-6 --lr-decay-style cosine # without warm-up
        --init-method-std 0.02
    )
    SCRIPT_ARGS=(--no-depth-scaled-init) # 0.02 in output projections too
    ;;
pretrain)
    # A first guess, tuned nowhere: Pion's learning rates are AdamW's and Muon's.
    OPTIMIZER_ARGS=(
        --optimizer pion
        --pion-recipe pretrain
        --lr 1e-3 --min-lr 1e-4
        --lr-decay-style cosine --lr-warmup-fraction 0.02
    )
    ;;
*)
    echo "RECIPE=$RECIPE: must be paper-1.3b or pretrain" >&2
    exit 1
    ;;
esac
SMOKE_PROCESSES=2
SMOKE_ARGS=(
    --num-layers 2 --hidden-size 64 --ffn-hidden-size 172 --num-attention-heads 4
    --seq-length 64 --max-position-embeddings 64 --global-batch-size 8 --micro-batch-size 4
)
source "$(dirname "$0")/launch.sh"
