"""Stand-ins on PATH for ``aligndistil train`` and Slurm's commands, and what they were given."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.unit.launch import slurm_stand_ins

EXAMPLES = Path(__file__).parents[3] / "examples"

# Notes its arguments and exports a model, unless it is to be cut off in that stage: then it leaves a checkpoint only.
TRAINER = """
import json, os, pathlib, sys
argv = sys.argv[3:] if sys.argv[1] == "-m" else sys.argv[1:]
assert argv[0] == "train", argv
with open(os.environ["STUB_LOG"], "a") as log:
    log.write(json.dumps(argv[1:]) + "\\n")
[folder] = [word.partition("=")[2] for word in argv if word.startswith("exp_manager.explicit_log_dir=")]
run = pathlib.Path(folder)
(run / "checkpoints" / "step_1").mkdir(parents=True, exist_ok=True)
if run.name == os.environ.get("STUB_CUT_OFF"):
    sys.exit(1)
if run.name != os.environ.get("STUB_NO_EXPORT"):
    (run / "huggingface").mkdir()
"""
# ``aligndistil launch`` is the real one; on its nodes the stand-in takes Python's place.
PROGRAM = f"""
import os, sys
if sys.argv[1] == "train":
    os.execvp("trainer", ["trainer", *sys.argv[1:]])
os.execv({sys.executable!r}, [{sys.executable!r}, "-m", "megatron_aligndistil", *sys.argv[1:], "slurm.python=trainer"])
"""
PROGRAMS = {"aligndistil": PROGRAM, "trainer": TRAINER, **slurm_stand_ins.COMMANDS}


@dataclass(frozen=True)
class Ended:
    """How a script ended, and the arguments of ``aligndistil train`` in their order."""

    code: int
    stdout: str
    stderr: str
    trained: list[list[str]]

    @property
    def stages(self) -> list[str]:
        """Names of the runs that were started."""
        return [Path(value_of(argv, "exp_manager.explicit_log_dir")).name for argv in self.trained]


def value_of(argv: list[str], key: str) -> str:
    """The value of the last override of ``key``."""
    return [word.partition("=")[2] for word in argv if word.startswith(f"{key}=")][-1]


def run_script(folder: Path, command: list[str], **variables: str) -> Ended:
    """Run a script of ``examples`` in ``folder`` with the stand-ins first on PATH."""
    programs = slurm_stand_ins.install(folder / "programs", PROGRAMS)
    log = folder / "trained.jsonl"
    log.unlink(missing_ok=True)
    environment = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "STUB_LOG": str(log),
        "SLURM_STAND_IN": str(folder / "slurm"),
        "HOME": str(folder),
        **variables,
    }
    result = subprocess.run(
        ["bash", *command], cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    trained = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return Ended(result.returncode, result.stdout, result.stderr, trained)
