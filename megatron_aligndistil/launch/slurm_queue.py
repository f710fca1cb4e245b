"""Submitting batch files to Slurm, and following jobs to their end."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_aligndistil.config.atomic import write_text
from megatron_aligndistil.errors import ConfigError
from megatron_aligndistil.launch.failures import BUG, INTERRUPTED
from megatron_aligndistil.launch.slurm_script import Job, render

_LOG_SECONDS = 1.0
_STATE_SECONDS = 5.0  # the controller answers everybody's questions
_ENDED = frozenset(
    ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "PREEMPTED")
)
FORGOTTEN = "no longer known"


@dataclass(frozen=True)
class Submitted:
    """A task in Slurm's queue, under its own number (``12``, in an array ``12_0``)."""

    name: str
    job_id: str
    log: Path
    results: Path


@dataclass(frozen=True)
class State:
    """What Slurm says of a job; ``code`` is its exit code once it has ended, 128 more than a signal that ended it."""

    name: str
    code: int = 0
    where: str = ""

    @property
    def has_ended(self) -> bool:
        """Whether it will not run again by itself."""
        return self.name in _ENDED or self.name == FORGOTTEN


def require_slurm() -> None:
    """Raise ConfigError where there is no sbatch to submit by."""
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "launch slurm: sbatch is not on the PATH; start this where Slurm is installed, or add --print and submit "
            "what it prints there"
        )


def submit(job: Job, after: Sequence[str] = ()) -> tuple[str, list[Submitted]]:
    """Write the job's batch file and submit it, to start once the jobs ``after`` have ended well.

    Returns the job's number and its tasks.

    Raises:
        ConfigError: nothing can be written there, or Slurm refuses the job.
    """
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
        write_text(job.script, render(job))
    except OSError as error:
        raise ConfigError(
            f"slurm.log_dir={job.folder}: cannot write there ({error.strerror or error}); choose another"
        ) from error
    command = ["sbatch", "--parsable", *dependency_options(after), str(job.script)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        said = " ".join(result.stderr.split()) or f"exit code {result.returncode}"
        raise ConfigError(f"{job.script}: Slurm refuses the job: {said}; correct the slurm.* keys")
    number = result.stdout.strip().partition(";")[0]  # ;cluster
    tasks = [
        Submitted(task.name, f"{number}_{index}" if job.is_array else number, job.log(number, index), task.results)
        for index, task in enumerate(job.tasks)
    ]
    return number, tasks


def dependency_options(after: Sequence[str]) -> list[str]:
    """A job whose predecessor fails is cancelled, instead of waiting for ever."""
    if not after:
        return []
    return [f"--dependency=afterok:{':'.join(after)}", "--kill-on-invalid-dep=yes"]


def state_of(job_id: str) -> State | None:
    """What Slurm says of a job; None where it doesn't answer just now."""
    command = ["scontrol", "show", "job", "--oneliner", job_id]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode == 0 and "JobState=" in result.stdout:
        values = dict(re.findall(r"(?:^|\s)(JobState|ExitCode|Reason|NodeList)=(\S+)", result.stdout))
        name = values["JobState"]
        reason, nodes = values.get("Reason", "None"), values.get("NodeList", "(null)")
        where = f"on {nodes}" if name == "RUNNING" else f"({reason})" if reason != "None" else ""
        return State(name, _code(name, values.get("ExitCode", "0:0")), where)
    if "Invalid job id" in result.stderr:  # it has ended some time ago
        return _accounted(job_id)
    return None


def _accounted(job_id: str) -> State:
    if shutil.which("sacct") is not None:
        command = ["sacct", "--jobs", job_id, "--allocations", "--noheader", "--parsable2", "--format=State,ExitCode"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode == 0 and "|" in result.stdout:
            state, code = result.stdout.splitlines()[0].split("|")
            name = state.split()[0]  # "CANCELLED by 1000"
            return State(name, _code(name, code))
    return State(FORGOTTEN, BUG)


def _code(name: str, said: str) -> int:
    code, number = (int(part) for part in said.split(":"))
    code = 128 + number if number else code
    return code or (BUG if name in _ENDED - {"COMPLETED"} else 0)


class _Followed:
    """A job whose log and state are printed as they come."""

    def __init__(self, job: Submitted, prefix: str) -> None:
        self.job, self.prefix = job, prefix
        self.state = State("")
        self._place = 0
        self._begun = ""  # a line that isn't whole yet

    def show_log(self, last: bool = False) -> None:
        if self.job.log.is_file():
            with self.job.log.open("rb") as file:
                file.seek(self._place)
                found = file.read()
            self._place += len(found)
            self._begun += found.decode(errors="replace")
        *lines, self._begun = self._begun.split("\n")
        if last and self._begun:
            lines, self._begun = [*lines, self._begun], ""
        for line in lines:
            print(f"{self.prefix}{line}")

    def show_state(self) -> None:
        state = state_of(self.job.job_id)
        if state is None:
            return
        if (state.name, state.where) != (self.state.name, self.state.where):
            said = " ".join(part for part in (f"job {self.job.job_id}: {state.name}", state.where) if part)
            print(f"[{time.strftime('%H:%M:%S')}] {self.job.name}: {said}")
        self.state = state


def follow(jobs: Sequence[Submitted]) -> int:
    """Print the jobs' logs and states until all have ended, and return the first exit code that isn't 0.

    Ctrl-C ends the following, not the jobs.
    """
    prefixes = {job.job_id: f"[{job.name}] " if len(jobs) > 1 else "" for job in jobs}
    followed = [_Followed(job, prefixes[job.job_id]) for job in jobs]
    asked = float("-inf")
    try:
        while True:
            if time.monotonic() - asked >= _STATE_SECONDS:
                asked = time.monotonic()
                for one in followed:
                    if not one.state.has_ended:
                        one.show_state()
            for one in followed:
                one.show_log(one.state.has_ended)
            sys.stdout.flush()
            if all(one.state.has_ended for one in followed):
                return next((one.state.code for one in followed if one.state.code), 0)
            time.sleep(_LOG_SECONDS)
    except KeyboardInterrupt:
        numbers = " ".join(job.job_id for job in jobs)
        print(f"\nno longer followed; the work goes on (scancel {numbers} ends it)", flush=True)
        return INTERRUPTED


def announce(submitted: Mapping[str, Sequence[Submitted]]) -> None:
    """Say what was submitted by which batch file, and where logs and results are."""
    for script, tasks in submitted.items():
        for task in tasks:
            print(f"{task.name}: job {task.job_id} ({script})\n  log:     {task.log}\n  results: {task.results}")
    sys.stdout.flush()
