"""The batch file of a job: readable, and able to stop, requeue and go on without the machine that submitted it."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_aligndistil.config.slurm_rules import runtime_of
from megatron_aligndistil.config.slurm_schema import SlurmConfig
from megatron_aligndistil.launch.failures import PREEMPTED

_STARTING = 128 + signal.SIGUSR1
_CORES_A_GPU = 4  # a rank, its data, copies between host and GPU


@dataclass(frozen=True)
class Task:
    """One run of the program.

    arguments  what follows its name
    results    the folder that the log names
    marker     (file, copy): made of the first when the run has ended well
    """

    name: str
    arguments: tuple[str, ...]
    results: Path
    marker: tuple[Path, Path] | None = None


@dataclass(frozen=True)
class Job:
    """A task, or an array of them, on ``nodes`` x ``devices`` ranks; ``folder`` takes the batch file and the logs."""

    name: str
    tasks: tuple[Task, ...]
    nodes: int
    devices: int
    on_gpus: bool
    settings: SlurmConfig
    folder: Path
    made_by: str

    @property
    def is_array(self) -> bool:
        return len(self.tasks) > 1

    @property
    def script(self) -> Path:
        """The batch file."""
        return self.folder / f"{self.name}.sbatch"

    def log(self, job_id: str, index: int = 0) -> Path:
        """What a submitted task prints."""
        return self.folder / (f"{job_id}_{index}.log" if self.is_array else f"{job_id}.log")


def render(job: Job) -> str:
    """The text of the batch file."""
    keeps_marker, requeues = job.tasks[0].marker is not None, job.settings.requeue
    blocks = (
        _options(job),
        _TRAP,
        _setup(job.settings),
        _threads(job),
        _nccl(job),
        _environment(job.settings),
        _rendezvous(job),
        _task(job),
        _step(job),
        _RUN,
        _STILL_OURS if keeps_marker or requeues else "",
        _MARKER if keeps_marker else "",
        _REQUEUE if requeues else "",
        'exit "$code"',
    )
    return "\n\n".join(block for block in blocks if block) + "\n"


def _options(job: Job) -> str:
    settings = job.settings
    cpus = settings.cpus_per_task
    if cpus is None and not settings.exclusive:
        cpus = job.devices * (_CORES_A_GPU if job.on_gpus else 1)
    memory = settings.mem if settings.mem is not None else "0" if settings.exclusive else None
    log = str(job.folder).replace("%", "%%") + ("/%A_%a.log" if job.is_array else "/%j.log")
    named = {
        "job-name": settings.job_name or job.name,
        "partition": settings.partition,
        "account": settings.account,
        "qos": settings.qos,
        "time": settings.time,
        "dependency": settings.dependency,
        "array": f"0-{len(job.tasks) - 1}" if job.is_array else None,
        "nodes": job.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": job.devices if job.on_gpus else None,
        "cpus-per-task": cpus,
        "mem": memory,
        "exclusive": settings.exclusive,
        "requeue" if settings.requeue else "no-requeue": True,
        "signal": f"B:USR1@{settings.signal_seconds}",
        "open-mode": "append",
        "output": log,
        "chdir": Path.cwd(),
    }
    comments = {
        "ntasks-per-node": "one launcher a node, which starts a rank a device",
        "requeue": "where a node is lost, Slurm starts the job again; it goes on from the newest checkpoint",
        "signal": "seconds before the time limit this shell is told to stop, see below",
        "open-mode": "keep what was logged before a requeue",
    }
    lines = [f"#!/usr/bin/env bash\n# Made by: {job.made_by}\n# Submitted again, the job goes on where it was."]
    for name, value in named.items():
        if value is None or value is False:
            continue
        option = f"--{name}" if value is True else f"--{name}={_quoted(str(value))}"
        lines.append(f"#SBATCH {option}" + (f"  # {comments[name]}" if name in comments else ""))
    return "\n".join([*lines, *(f"#SBATCH {option}" for option in settings.extra)])


def _quoted(value: str) -> str:
    return f'"{value}"' if any(character in value for character in " \t#") else value


def _setup(settings: SlurmConfig) -> str:
    if not settings.setup:
        return ""
    return "\n".join(
        ["# The nodes' software (slurm.setup); a line that fails ends the job.", "set -e", *settings.setup, "set +e"]
    )


def _threads(job: Job) -> str:
    count = job.devices
    return (
        f"# Threads: the cores that Slurm gives this job on a node, shared by its {count} rank{'s'[: count > 1]}.\n"
        f"export OMP_NUM_THREADS=$((SLURM_CPUS_ON_NODE > {count} ? SLURM_CPUS_ON_NODE / {count} : 1))"
    )


def _nccl(job: Job) -> str:
    if not job.on_gpus:
        return ""
    return (
        "# NCCL carries what GPUs tell each other. It finds InfiniBand and NVLink by itself; where it takes the wrong\n"
        "# interface, name it: +slurm.environment.NCCL_SOCKET_IFNAME=<interface> or NCCL_IB_HCA.\n"
        "export NCCL_DEBUG=WARN  # says why, when it fails\n"
        "export TORCH_NCCL_ASYNC_ERROR_HANDLING=1  # a rank whose peer is lost ends, instead of waiting for ever\n"
        "# Communication is queued before the products that it overlaps with, in the order of the calls.\n"
        "export CUDA_DEVICE_MAX_CONNECTIONS=1"
    )


def _environment(settings: SlurmConfig) -> str:
    if not settings.environment:
        return ""
    exports = [f"export {name}={shlex.quote(value)}" for name, value in settings.environment.items()]
    return "\n".join(["# slurm.environment", *exports])


def _rendezvous(job: Job) -> str:
    if job.nodes == 1:
        return ""
    return (
        "# Rendezvous: this shell runs on the job's first node, where the launchers of all nodes meet. Jobs that\n"
        "# share that node have ports of their own, by their numbers; the name tells a requeued run from the last.\n"
        'export PET_RDZV_ENDPOINT="$(hostname):$((20000 + SLURM_JOB_ID % 12000))"\n'
        'export PET_RDZV_ID="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"'
    )


def _task(job: Job) -> str:
    if not job.is_array:
        return f'# What runs.\njob="$SLURM_JOB_ID"\n{_assignments(job.tasks[0])}\n{_GREETING}'
    cases = "\n".join(f"{index})\n{_indented(_assignments(task))}\n    ;;" for index, task in enumerate(job.tasks))
    return (
        "# What runs: one of these, by the number in the array.\n"
        'job="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"\n'
        f'case "$SLURM_ARRAY_TASK_ID" in\n{cases}\nesac\n{_GREETING}'
    )


def _assignments(task: Task) -> str:
    lines = [f"name={shlex.quote(task.name)}", f"results={shlex.quote(str(task.results))}", "arguments=("]
    lines += [f"    {line}" for line in _lines_of(task.arguments)] + [")"]
    if task.marker is not None:
        lines += [
            f"{name}={shlex.quote(str(path))}" for name, path in zip(("ended", "marker"), task.marker, strict=True)
        ]
    return "\n".join(lines)


def _lines_of(arguments: Sequence[str]) -> list[str]:
    """One line an argument, an option with its value."""
    lines: list[str] = []
    for place, argument in enumerate(arguments):
        if place and arguments[place - 1].startswith("--"):
            lines[-1] += f" {shlex.quote(argument)}"
        else:
            lines.append(shlex.quote(argument))
    return lines


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def _step(job: Job) -> str:
    settings, runtime = job.settings, runtime_of(job.settings)
    step = [f"--nodes={job.nodes} --ntasks={job.nodes} --ntasks-per-node=1"]
    if settings.cpus_per_task is not None or not settings.exclusive:
        step.append('--cpus-per-task="$SLURM_CPUS_PER_TASK"  # srun doesn\'t take it over by itself')
    step += [
        "--cpu-bind=none  # a launcher's ranks share the node's cores and see all GPUs of the job",
        "--kill-on-bad-exit=1  # a node that fails ends the others, instead of leaving them to wait for it",
    ]
    # Neither what the submitting shell exported nor what an image's hooks set may pass for torchrun's variables.
    program = ["env -u RANK -u LOCAL_RANK -u WORLD_SIZE"]
    if runtime == "pyxis":
        step += _pyxis(job)
    elif runtime == "apptainer":
        program.insert(0, _apptainer(job))
    python = settings.python or (sys.executable if runtime is None else "python3")
    program.append(f'{shlex.quote(python)} -m megatron_aligndistil "${{arguments[@]}}"')
    lines = ["# One job step: srun starts the launcher on every node.", "step=(", "    srun"]
    lines += [f"    {option}" for option in step]
    if runtime == "apptainer":
        lines.append("    # The program runs in a container, which apptainer starts on every node.")
    return "\n".join([*lines, *(f"    {part}" for part in program), ")"])


def _mounts(job: Job) -> list[str]:
    own = f"{Path.cwd()}:{Path.cwd()}"
    return [own, *(mount for mount in job.settings.container_mounts if mount != own)]


def _pyxis(job: Job) -> list[str]:
    assert job.settings.container_image is not None
    names = ["OMP_NUM_THREADS", *job.settings.environment]
    if job.on_gpus:
        names += ["NCCL_DEBUG", "TORCH_NCCL_ASYNC_ERROR_HANDLING", "CUDA_DEVICE_MAX_CONNECTIONS"]
    return [
        "# The program runs in a container, which pyxis and enroot start on every node.",
        f"--container-image={shlex.quote(job.settings.container_image)}",
        f"--container-mounts={shlex.quote(','.join(_mounts(job)))}",
        f"--container-workdir={shlex.quote(str(Path.cwd()))}",
        f"--container-env={','.join(dict.fromkeys(names))}  # these win over the image's own",
    ]


def _apptainer(job: Job) -> str:
    assert job.settings.container_image is not None
    binds = " ".join(f"--bind {shlex.quote(mount)}" for mount in _mounts(job))
    gpus = "--nv " if job.on_gpus else ""
    return (
        f"apptainer exec {gpus}{binds} --pwd {shlex.quote(str(Path.cwd()))} {shlex.quote(job.settings.container_image)}"
    )


_GREETING = """\
echo "$(date '+%F %T') $name: job $job, start $((${SLURM_RESTART_COUNT:-0} + 1)), on $SLURM_JOB_NODELIST"
echo "results: $results\""""

_TRAP = """\
# Stopping: Slurm sends USR1 to this shell before the time limit, and `scancel --signal=USR1 --batch` does at any time.
stopping=0
trap 'stopping=1' USR1 TERM"""

_RUN = f"""\
# srun hands USR1 on to every launcher: the run finishes its step, saves a checkpoint and exits with {PREEMPTED}.
"${{step[@]}}" &
srun_pid=$!
while kill -0 "$srun_pid" 2>/dev/null; do
    ((stopping)) && kill -USR1 "$srun_pid" 2>/dev/null
    sleep 2 &
    wait $!  # ends at once when a signal comes
done
wait "$srun_pid"
code=$?
trap '' USR1 TERM
echo "$(date '+%F %T') $name: ended with exit code $code\""""

_STILL_OURS = """\
# A job that was cancelled, that lost a node or that Slurm requeues itself isn't RUNNING by now.
still_ours() { scontrol show job "$job" | grep -q 'JobState=RUNNING'; }"""

_MARKER = """\
# Ended well: the settings that it was trained by say so, and a chain that is submitted again leaves it out.
if ((code == 0)) && still_ours; then
    cp -- "$ended" "$marker.part" && mv -- "$marker.part" "$marker"
fi"""

_REQUEUE = f"""\
# Requeueing: after {PREEMPTED}, and after {_STARTING}, which says that USR1 came before the run could listen. Any other
# failure would only come again.
if ((code == {PREEMPTED} || code == {_STARTING})) && still_ours; then
    echo "$name: requeued, to go on from its newest checkpoint"
    scontrol requeue "$job"
fi"""
