# Sourced by the launches of this folder: runs Megatron with the arrays that they set, then the
# flags that they were given, which win.
#
# The environment says the rest:
#
#   DATA       prefix of Megatron's dataset, from ../prepare_corpus.py; --smoke can do without
#   TOKENIZER  Hugging Face's, name or folder, that DATA was made with; bytes if not set
#   SAVE       folder of the checkpoints, from which the run also resumes; none if not set
#   GPUS       on this machine; default: all. For more machines: ../slurm, or TORCHRUN_ARGS
#   MEGATRON   a checkout of Megatron-LM, for its megatron and its pretrain_gpt.py instead of the
#              installed megatron-core and ../pretrain_bytes.py
#   PYTHON     default: this repository's .venv, where there is one

EXAMPLES=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
ROOT=$(dirname "$EXAMPLES")
[[ -n ${PYTHON:-} || ! -x $ROOT/.venv/bin/python ]] || PYTHON=$ROOT/.venv/bin/python
PYTHON=${PYTHON:-python}
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1} # Megatron wants it for TP
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

fail() {
    echo "$(basename "$0"): $1" >&2
    exit 1
}

# Without Transformer Engine and apex: none of their fused kernels.
PLAIN_ARGS=(
    --transformer-impl local --no-gradient-accumulation-fusion --no-masked-softmax-fusion
    --no-persist-layer-norm --no-rope-fusion --no-bias-swiglu-fusion --no-bias-gelu-fusion
    --no-bias-dropout-fusion --no-create-attention-mask-in-dataloader
)

ARGS=("${MODEL_ARGS[@]}" "${TRAIN_ARGS[@]}" "${OPTIMIZER_ARGS[@]}")
if [[ -n ${MEGATRON:-} ]]; then
    SCRIPT=$MEGATRON/pretrain_gpt.py
    [[ -f $SCRIPT ]] || fail "MEGATRON=$MEGATRON: no pretrain_gpt.py there"
    [[ ${#SCRIPT_ARGS[@]} == 0 ]] || echo "not in Megatron's own script: ${SCRIPT_ARGS[*]}"
    PYTHONPATH=$MEGATRON${PYTHONPATH:+:$PYTHONPATH}
else
    SCRIPT=$EXAMPLES/pretrain_bytes.py
    ARGS+=("${SCRIPT_ARGS[@]}")
fi
export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}

LAUNCHER=()
if [[ ${1:-} == --smoke ]]; then
    shift
    if [[ -z ${DATA:-} ]]; then
        DIR=$(mktemp -d)
        trap 'rm -rf "$DIR"' EXIT
        DATA=$DIR/corpus TOKENIZER=
        "$PYTHON" "$EXAMPLES/prepare_corpus.py" "$DATA" --max-bytes 400000
    fi
    GPUS=$SMOKE_PROCESSES LAUNCHER=(--cpu) TORCHRUN_ARGS=--standalone
    ARGS+=(
        "${PLAIN_ARGS[@]}" "${SMOKE_ARGS[@]}" --distributed-backend gloo --num-workers 0
        --train-iters 20 --log-interval 1 --eval-iters 1 --split 9,1,0
    )
elif ! "$PYTHON" -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("transformer_engine"))'
then
    echo "no Transformer Engine here: Megatron's own layers, which are slower"
    ARGS+=("${PLAIN_ARGS[@]}")
fi

[[ -f ${DATA:-}.bin && -f $DATA.idx ]] || fail "DATA=${DATA:-}: no .bin and .idx of that prefix; \
python examples/prepare_corpus.py PREFIX --text FILES [--tokenizer NAME] makes them"
ARGS+=(--data-path "$DATA" --data-cache-path "$(dirname "$DATA")/cache")
if [[ -n ${TOKENIZER:-} ]]; then
    ARGS+=(--tokenizer-type HuggingFaceTokenizer --tokenizer-model "$TOKENIZER")
else # of prepare_corpus.py
    ARGS+=(--tokenizer-type NullTokenizer --vocab-size 256 --null-tokenizer-eod-id 0)
fi
[[ -z ${SAVE:-} ]] || ARGS+=(--save "$SAVE" --load "$SAVE")
GPUS=${GPUS:-$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')}
[[ $GPUS != 0 ]] || fail "no GPU here: --smoke runs on the CPU"

# shellcheck disable=SC2086
"$PYTHON" -m torch.distributed.run --nproc-per-node "$GPUS" ${TORCHRUN_ARGS:---standalone} \
    -m megatron_patches "${LAUNCHER[@]}" "$SCRIPT" "${ARGS[@]}" "$@"
