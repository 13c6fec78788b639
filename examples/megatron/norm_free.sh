#!/usr/bin/env bash
# Llama 60M without any normalisation layer, otherwise RECIPE=pretrain llama_60m.sh:
#
#     examples/megatron/norm_free.sh --smoke            # a tiny one, on the CPU
#     DATA=corpus TOKENIZER=folder examples/megatron/norm_free.sh [MEGATRON'S FLAGS]
#
# Published (arXiv 2605.12492): at 60M Pion finishes so, AdamW and Muon end in NaN; the settings of
# that Pion run were not at hand. RECIPE=paper-60m starts from standard deviation 0.02, from which nothing moves at
# first: without norms the last layer's output is that small. Here, on far smaller models, all three
# finished at their own best learning rates (docs/TRAINING.md). --norm-free is of
# examples/pretrain_bytes.py: Megatron's own script has no such flag.
set -euo pipefail
[[ -z ${MEGATRON:-} ]] || { echo "norm_free.sh: Megatron's own script has no --norm-free" >&2; exit 1; }
SMOKE=()
[[ ${1:-} != --smoke ]] || { SMOKE=(--smoke); shift; }
export RECIPE=${RECIPE:-pretrain}
exec "$(dirname "$0")/llama_60m.sh" "${SMOKE[@]}" --transformer-impl local --norm-free "$@"
