"""Stand-ins on PATH for ``aligndistil``, ``srun``, ``torchrun`` and ``scontrol``, and what they were given."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

EXAMPLES = Path(__file__).parents[3] / "examples"

# Notes its arguments and exports a model, unless it is to be cut off in that stage: then it leaves a checkpoint only.
TRAINER = """
import json, os, pathlib, sys
argv = sys.argv[1:]
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
SRUN = """
import os, sys
words = sys.argv[1:]
while words[0].startswith("--"):
    words.pop(0)
os.execvp(words[0], words)
"""
TORCHRUN = """
import json, os, sys
words = sys.argv[1:]
at = words.index("-m")
assert words[at + 1] == "megatron_aligndistil", words
with open(os.environ["STUB_LOG"] + ".torchrun", "a") as log:
    log.write(json.dumps(words[:at]) + "\\n")
os.execvp("aligndistil", ["aligndistil", *words[at + 2:]])
"""
SCONTROL = "print('node7'); print('node8')"
PROGRAMS = {"aligndistil": TRAINER, "srun": SRUN, "torchrun": TORCHRUN, "scontrol": SCONTROL}


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
    programs = folder / "programs"
    programs.mkdir(exist_ok=True)
    for name, body in PROGRAMS.items():
        (programs / name).write_text(f"#!{sys.executable} -S\n{body}")
        (programs / name).chmod(0o755)
    log = folder / "trained.jsonl"
    log.unlink(missing_ok=True)
    environment = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "STUB_LOG": str(log),
        "HOME": str(folder),
        **variables,
    }
    result = subprocess.run(
        ["bash", *command], cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    trained = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return Ended(result.returncode, result.stdout, result.stderr, trained)
