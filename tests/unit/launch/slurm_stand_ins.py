"""Stand-ins for Slurm's commands, for tests of what is around them: a job is run by sbatch itself, at once."""

from __future__ import annotations

import sys
from pathlib import Path

# Runs the batch file, and again while it is requeued; $SLURM_STAND_IN is a folder: the jobs' logs of calls and states.
SBATCH = """
import os, pathlib, re, subprocess, sys
folder = pathlib.Path(os.environ["SLURM_STAND_IN"])
folder.mkdir(exist_ok=True)
with (folder / "sbatch").open("a") as log:
    log.write(" ".join(sys.argv[1:]) + "\\n")
if (folder / "refuse").exists():
    sys.exit("sbatch: error: Batch job submission failed:\\n invalid account")
script = pathlib.Path(sys.argv[-1])
text = script.read_text()
job = str(len((folder / "sbatch").read_text().splitlines()))
state = folder / job
nodes = re.search("^#SBATCH --nodes=(.*)$", text, re.M)[1]
for index in range(2) if "--array=0-1" in text else [None]:
    own = {"SLURM_ARRAY_JOB_ID": job, "SLURM_ARRAY_TASK_ID": str(index)} if index is not None else {}
    log = re.search("^#SBATCH --output=(.*)$", text, re.M)[1].strip('"').replace("%A", job).replace("%a", str(index))
    for restart in range(3):
        state.write_text("JobState=RUNNING ExitCode=0:0")
        variables = {**os.environ, **own, "SLURM_JOB_ID": job, "SLURM_JOB_NODELIST": f"node[1-{nodes}]"}
        variables |= {"SLURM_CPUS_ON_NODE": "16", "SLURM_CPUS_PER_TASK": "16", "SLURM_RESTART_COUNT": str(restart)}
        with open(log.replace("%j", job), "a") as output:
            code = subprocess.run(["bash", script], env=variables, stdout=output, stderr=output).returncode
        if "PENDING" not in state.read_text():
            break
    state.write_text(f"JobState={'FAILED' if code else 'COMPLETED'} ExitCode={code}:0 NodeList=node1 Reason=None")
print(job)
"""
SCONTROL = """
import os, pathlib, sys
state = pathlib.Path(os.environ["SLURM_STAND_IN"]) / sys.argv[-1].partition("_")[0]
if sys.argv[1] == "requeue":
    state.write_text("JobState=PENDING Reason=BeginTime ExitCode=0:0")
elif state.exists():
    print("JobId=1", state.read_text())
else:
    sys.exit("slurm_load_jobs error: Invalid job id specified")
"""
# What srun starts on the first node; its own options are written beside.
SRUN = """
import os, pathlib, sys
words = sys.argv[1:]
with (pathlib.Path(os.environ["SLURM_STAND_IN"]) / "srun").open("a") as log:
    rendezvous = [os.environ.get(name, "-") for name in ("PET_RDZV_ENDPOINT", "PET_RDZV_ID", "OMP_NUM_THREADS")]
    log.write(" ".join([*rendezvous, *words]) + "\\n")
while words[0].startswith("--"):
    words.pop(0)
os.execvp(words[0], words)
"""
COMMANDS = {"sbatch": SBATCH, "scontrol": SCONTROL, "srun": SRUN}


def install(folder: Path, programs: dict[str, str]) -> Path:
    """Write Python programs into ``folder`` by their names, to be put on the PATH."""
    folder.mkdir(exist_ok=True)
    for name, body in programs.items():
        (folder / name).write_text(f"#!{sys.executable} -S\n{body}")
        (folder / name).chmod(0o755)
    return folder
