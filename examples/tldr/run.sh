#!/usr/bin/env bash
# The rows of the paper's Table 4: run.sh FOLDER [key=value ...]
#   FOLDER     qwen2.5-1.5b; key=value overrides the settings of every stage
#   MODEL      the base model, a Hugging Face folder
#   DATA       a folder that tools/prepare_data.py has made of tldr-preference; default: the hub's data set
#   SFT_DATA   the same, of tldr
#   RUNS       where results go; default: runs/tldr/FOLDER
#   STAGES     some of the stages, as in STAGES="sft dpo reverse_dpo aligndistil"; default: all
#   TRAIN      the command that trains; default: aligndistil train. For Slurm: aligndistil launch slurm --follow ...
# A stage that has ended is skipped, one that was cut off goes on.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
name=run.sh
prefix=tldr
# shellcheck source=../stages.sh
source "$here/../stages.sh"

folder="${1:-}"
check_folder "$folder" "$here"
configs="$here/$folder"
extra=("${@:2}")
: "${MODEL:?set MODEL to the folder of the base model}"
RUNS="${RUNS:-runs/tldr/$folder}"
check_stages sft reward_model dpo reverse_dpo aligndistil aligndistil_on_policy ppo rto

mapfile -t data < <(prepared "${DATA:-}")
mapfile -t sft_data < <(prepared "${SFT_DATA:-}")
start=(model.restore_from_path="$RUNS/sft/huggingface" "${data[@]}")
dpo="$RUNS/dpo/huggingface"
teachers=(model.aligndistil.dpo_path="$dpo" model.aligndistil.reverse_dpo_path="$RUNS/reverse_dpo/huggingface")
reward="$RUNS/reward_model/huggingface"

stage sft model.restore_from_path="$MODEL" "${sft_data[@]}"
stage reward_model "${start[@]}"
stage dpo "${start[@]}"
stage reverse_dpo "${start[@]}"
stage aligndistil "${start[@]}" "${teachers[@]}"
stage aligndistil_on_policy "${start[@]}" "${teachers[@]}"
stage ppo "${start[@]}" model.reward.path="$reward"
stage rto "${start[@]}" model.reward.path="$reward" model.rto.dpo_path="$dpo"
