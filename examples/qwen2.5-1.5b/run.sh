#!/usr/bin/env bash
# DPO, reverse DPO and off-policy AlignDistil of Qwen2.5-1.5B-Instruct on UltraFeedback, on one node of 8 GPUs.
#   MODEL  the Hugging Face folder of Qwen2.5-1.5B-Instruct
#   RUNS   where results go
# A run that is there already goes on from its last checkpoint, or ends at once where it had ended.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
: "${MODEL:?set MODEL to the folder of Qwen2.5-1.5B-Instruct}"
RUNS="${RUNS:-runs/qwen2.5-1.5b}"

train() {
    local name="$1"
    shift
    aligndistil train --config-dir "$here" --config-name "qwen_$name" model.restore_from_path="$MODEL" \
        exp_manager.explicit_log_dir="$RUNS/$name" "$@"
}

train dpo "$@"
train reverse_dpo "$@"
train aligndistil model.aligndistil.dpo_path="$RUNS/dpo" model.aligndistil.reverse_dpo_path="$RUNS/reverse_dpo" "$@"
aligndistil convert "$RUNS/aligndistil" "$RUNS/aligndistil-hf" --to hf
