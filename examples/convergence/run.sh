#!/usr/bin/env bash
# Figure 2 of the paper: three objectives from the same start, their curves and how much faster one is than another.
#   MODEL, DPO, REVERSE  the initial, the DPO and the reverse DPO model: folders as of Hugging Face, or of a run
#   PROMPTS              data with prompts: JSONL, Parquet or a hub name
#   RUNS                 where results go
#   SEEDS                at least two
#   WINDOW               steps that a point of a curve averages
# The first four default to what `aligndistil quickstart --tiny` makes, which is run where they are missing. What is
# appended overrides the settings of every training run. A run that has ended is skipped, one that was cut off goes on.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
RUNS="${RUNS:-runs/convergence}"
SEEDS="${SEEDS:-1 2 3}"
WINDOW="${WINDOW:-5}"
tiny="$RUNS/quickstart"
if [[ -z "${MODEL:-}" || -z "${DPO:-}" || -z "${REVERSE:-}" || -z "${PROMPTS:-}" ]] &&
    [[ ! -f "$tiny/report.md" ]]; then # its last file
    aligndistil quickstart --tiny --output "$tiny"
fi
MODEL="${MODEL:-$tiny/initial/huggingface}"
DPO="${DPO:-$tiny/dpo/huggingface}"
REVERSE="${REVERSE:-$tiny/reverse_dpo/huggingface}"
PROMPTS="${PROMPTS:-$tiny/data/train.jsonl}"

# Runs of different settings must not meet in one figure: RUNS belongs to the first ones that it has seen.
mkdir -p "$RUNS"
settings="$(printf '%s\n' "$MODEL" "$DPO" "$REVERSE" "$PROMPTS" "$@" && cat "$here"/*.yaml)"
if [[ ! -f "$RUNS/settings.txt" ]]; then
    printf '%s\n' "$settings" >"$RUNS/settings.txt"
elif [[ "$settings" != "$(cat "$RUNS/settings.txt")" ]]; then
    echo "run.sh: error: RUNS=$RUNS: holds runs with other settings (settings.txt there); give another folder" >&2
    exit 2
fi

train() {
    local objective="$1" seed="$2" section="$3"
    local run="$RUNS/$objective/seed_$seed"
    shift 3
    [[ ! -f "$run/ended" ]] || return 0
    aligndistil train --config-dir "$here" --config-name "$objective" model.restore_from_path="$MODEL" \
        "model.$section.dpo_path=$DPO" "model.$section.reverse_dpo_path=$REVERSE" \
        "model.data.data_prefix.train=[$PROMPTS]" model.seed="$seed" exp_manager.explicit_log_dir="$run" "$@"
    touch "$run/ended"
}

for seed in $SEEDS; do
    train distributional "$seed" aligndistil "$@"
    train token_scalar "$seed" pg "$@"
    train sentence_level "$seed" pg "$@"
done
python "$here/../../tools/compare_convergence.py" "$RUNS" --window "$WINDOW"
