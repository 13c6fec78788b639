#!/usr/bin/env bash
# A mixture of experts like Qwen3-30B-A3B with Pion, from scratch, on 8 GPUs or a multiple:
#
#     examples/megatron/qwen3_moe.sh --smoke            # a tiny one, on the CPU
#     DATA=corpus TOKENIZER=Qwen/Qwen3-30B-A3B examples/megatron/qwen3_moe.sh [MEGATRON'S FLAGS]
#
# launch.sh says what else the environment sets. --load and --finetune with --pion-recipe finetune
# go on from trained weights.
set -euo pipefail

MODEL_ARGS=(
    --num-layers 48
    --hidden-size 2048
    --ffn-hidden-size 6144
    --num-attention-heads 32
    --group-query-attention
    --num-query-groups 4
    --kv-channels 128
    --qk-layernorm
    --seq-length 4096
    --max-position-embeddings 40960
    --position-embedding-type rope
    --rotary-base 1000000
    --normalization RMSNorm
    --norm-epsilon 1e-6
    --swiglu
    --disable-bias-linear
    --untie-embeddings-and-output-weights
    --attention-dropout 0
    --hidden-dropout 0
)
# Every expert's weights are matrices of Pion's, whole on one rank; the router is one matrix.
MOE_ARGS=(
    --num-experts 128
    --moe-ffn-hidden-size 768
    --moe-router-topk 8
    --moe-router-load-balancing-type aux_loss
    --moe-aux-loss-coeff 1e-3
    --moe-router-dtype fp32
    --moe-token-dispatcher-type alltoall
    --moe-grouped-gemm
)
TRAIN_ARGS=(
    --expert-model-parallel-size 8
    --use-distributed-optimizer
    --global-batch-size 256
    --micro-batch-size 1
    --train-iters 100000 # of 256 x 4096 tokens: 105B
    --clip-grad 1.0
    --bf16
    --recompute-granularity selective
    --split 99,1,0
    --eval-interval 1000
    --eval-iters 20
    --log-interval 10
    --save-interval 1000
    --ckpt-format torch_dist
)
# A first guess, tuned nowhere: Pion's learning rates are AdamW's and Muon's.
OPTIMIZER_ARGS=(
    --optimizer pion
    --lr 1e-3 --min-lr 1e-4
    --lr-decay-style cosine --lr-warmup-fraction 0.02
    --weight-decay 0.1 # of Adam's parameters alone
)
MODEL_ARGS+=("${MOE_ARGS[@]}")
SCRIPT_ARGS=()
SMOKE_PROCESSES=2
SMOKE_ARGS=(
    --num-layers 2 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4
    --num-query-groups 2 --kv-channels 16 --num-experts 8 --moe-ffn-hidden-size 32
    --moe-router-topk 2 --seq-length 64 --max-position-embeddings 64
    --expert-model-parallel-size 2 --global-batch-size 8 --micro-batch-size 4
)
source "$(dirname "$0")/launch.sh"
