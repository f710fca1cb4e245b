#!/usr/bin/env bash
# The rows of the paper's Table 1 for one model: run.sh FOLDER [key=value ...]
#   FOLDER          qwen2-1.5b, qwen2.5-1.5b, qwen2.5-7b or llama3-8b; key=value overrides the settings of every stage
#   MODEL           the model to start from, a Hugging Face folder (for qwen2.5-7b the base model)
#   DATA            a folder that tools/prepare_data.py has made; default: the hub's data sets
#   SFT_DATA        the same, of UltraChat (qwen2.5-7b)
#   REWARD_INITIAL  what the reward model is trained from; default: what the policy is
#   REWARD_MODEL    a trained reward model, instead of the stage reward_model
#   RUNS            where results go; default: runs/ultrafeedback/FOLDER
#   STAGES          some of the stages, as in STAGES="dpo reverse_dpo aligndistil"; default: all
#   TRAIN           the command that trains; default: aligndistil train. For Slurm: aligndistil launch slurm --follow ...
# A stage that has ended is skipped, one that was cut off goes on.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
name=run.sh
prefix=uf
# shellcheck source=../stages.sh
source "$here/../stages.sh"

folder="${1:-}"
check_folder "$folder" "$here"
configs="$here/$folder"
extra=("${@:2}")
: "${MODEL:?set MODEL to the folder of the model to start from}"
RUNS="${RUNS:-runs/ultrafeedback/$folder}"
check_stages sft dpo reverse_dpo aligndistil aligndistil_on_policy dpo_001 kto tdpo1 tdpo2 simpo reward_model ppo rto

mapfile -t data < <(prepared "${DATA:-}")
initial="$MODEL"
if [[ -f "$configs/uf_sft.yaml" ]]; then
    mapfile -t sft_data < <(prepared "${SFT_DATA:-}")
    stage sft model.restore_from_path="$MODEL" "${sft_data[@]}"
    initial="$RUNS/sft/huggingface"
fi
start=(model.restore_from_path="$initial" "${data[@]}")
dpo="$RUNS/dpo/huggingface"
teachers=(model.aligndistil.dpo_path="$dpo" model.aligndistil.reverse_dpo_path="$RUNS/reverse_dpo/huggingface")
reward="${REWARD_MODEL:-$RUNS/reward_model/huggingface}"

stage dpo "${start[@]}"
stage reverse_dpo "${start[@]}"
stage aligndistil "${start[@]}" "${teachers[@]}"
stage aligndistil_on_policy "${start[@]}" "${teachers[@]}"
for baseline in dpo_001 kto tdpo1 tdpo2 simpo; do
    stage "$baseline" "${start[@]}"
done
if [[ -z "${REWARD_MODEL:-}" ]]; then
    stage reward_model model.restore_from_path="${REWARD_INITIAL:-$initial}" "${data[@]}"
fi
stage ppo "${start[@]}" model.reward.path="$reward"
stage rto "${start[@]}" model.reward.path="$reward" model.rto.dpo_path="$dpo"
