# Sourced by a family's run.sh, which sets
#   name     of the script, for its messages
#   configs  the model's folder of YAML files
#   prefix   of the configs' names
#   RUNS     where results go
#   extra    an array: overrides of every stage
# shellcheck shell=bash

# The command that trains: for Slurm one that submits a job, and ends as the job does.
read -ra train <<<"${TRAIN:-aligndistil train}"

# stage NAME [key=value ...]: train by <prefix>_<NAME>.yaml into RUNS/NAME. The exported model is a run's last output
# and appears whole: where it is, there is nothing to do. A run that was cut off goes on from its newest checkpoint.
stage() {
    local stage="$1"
    shift
    [[ -z "${STAGES:-}" || " $STAGES " == *" $stage "* ]] || return 0
    if [[ -d "$RUNS/$stage/huggingface" ]]; then
        echo "$name: $stage: done ($RUNS/$stage/huggingface)"
        return 0
    fi
    echo "$name: $stage"
    "${train[@]}" --config-dir "$configs" --config-name "${prefix}_$stage" \
        exp_manager.explicit_log_dir="$RUNS/$stage" "$@" "${extra[@]}"
    if [[ ! -d "$RUNS/$stage/huggingface" ]]; then
        echo "$name: error: $stage ended without $RUNS/$stage/huggingface; the stages after it need that" >&2
        exit 2
    fi
}

# check_stages NAME ...: refuse a name in STAGES that is none of these.
check_stages() {
    local asked
    for asked in ${STAGES:-}; do
        if [[ " $* " != *" $asked "* ]]; then
            echo "$name: error: STAGES: $asked is not a stage; there are $*" >&2
            exit 2
        fi
    done
}

# check_folder FOLDER HERE: refuse what is no folder of configs in HERE.
check_folder() {
    if [[ -z "$1" || ! -f "$2/$1/model.yaml" ]]; then
        echo "$name: error: '$1' is not a model's folder; there are $(cd "$2" && echo */)" >&2
        exit 2
    fi
}

# prepared FOLDER: the two overrides that name what tools/prepare_data.py has made there, one a line; none without one.
prepared() {
    [[ -z "$1" ]] || printf 'model.data.data_prefix.%s\n' "train=[$1/train.jsonl]" "validation=[$1/validation.jsonl]"
}
