"""A real Slurm of two nodes on this machine: its daemons, their keys, sockets and logs are all below one folder."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_aligndistil.parallel.ports import free_port

DAEMONS = ("munged", "slurmctld", "slurmd")
NODES = ("n1", "n2")
LIMIT_SECONDS = 240

# requeue: a requeued job waits for cred_expire, of which 5 s is the least.
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
JobRequeue=1
MailProg=/bin/true
SwitchType=switch/none
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """Why there can be no cluster here; None where there can."""
    missing = [name for name in DAEMONS if shutil.which(name, path=_path()) is None]
    if missing:
        return f"Slurm is not installed ({', '.join(missing)}): apt-get install slurm-wlm munge"
    return None if os.geteuid() == 0 else "Slurm's daemons need root"


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


def eventually(holds: Callable[[], bool], what: str, seconds: float = LIMIT_SECONDS) -> None:
    """Wait until ``holds``."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.05)


class Cluster:
    """The running cluster."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        configuration = str(folder / "slurm.conf")
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))},
            "PATH": _path(),
            "SLURM_CONF": configuration,
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
        }
        self._daemons: list[subprocess.Popen[bytes]] = []

    def wait_until(self, holds: Callable[[], bool], what: str, seconds: float = LIMIT_SECONDS) -> None:
        """Wait until ``holds``; where it doesn't, say what the last launch has printed."""
        try:
            eventually(holds, what, seconds)
        except AssertionError as error:
            queue = self.slurm("squeue", "--long") + self.slurm("sinfo", "--long")
            raise AssertionError(f"{error}\n{queue}\n{self.printed[-6000:]}") from None

    def slurm(self, *command: str) -> str:
        """What one of Slurm's commands answers."""
        result = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, check=False, timeout=LIMIT_SECONDS
        )
        assert result.returncode == 0, f"{command}: {result.stderr}"
        return result.stdout

    def job(self, job_id: str) -> dict[str, str]:
        """What the controller knows of a job."""
        found = self.slurm("scontrol", "show", "job", "--oneliner", job_id)
        return dict(re.findall(r"(\w+)=(\S*)", found))

    def launch(self, *arguments: str) -> subprocess.Popen[str]:
        """Start ``aligndistil launch slurm``; what it prints goes to ``printed``."""
        command = [sys.executable, "-m", "megatron_aligndistil", "launch", "slurm", *arguments]
        with (self.folder / "printed.txt").open("w") as output:
            return subprocess.Popen(command, env=self.environment, stdout=output, stderr=subprocess.STDOUT, text=True)

    @property
    def printed(self) -> str:
        """What the last launch has printed by now."""
        return (self.folder / "printed.txt").read_text()

    def submitted(self, name: str) -> str:
        """The number of a job that the last launch has submitted."""
        pattern = re.compile(rf"^{name}: job (\S+) ", re.MULTILINE)
        self.wait_until(lambda: pattern.search(self.printed) is not None, f"{name} is submitted", 60)
        found = pattern.search(self.printed)
        assert found is not None
        return found[1]

    def start(self) -> None:
        """Start the daemons and wait for both nodes."""
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir(parents=True)
        ports = [free_port() for _ in range(3)]
        host = socket.gethostname().partition(".")[0]
        (self.folder / "slurm.conf").write_text(CONFIGURATION.format(folder=self.folder, host=host, ports=ports))
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        own = {f"--{name}-file": self.folder / f"munge.{name}" for name in ("key", "pid", "log", "seed")}
        own["--socket"] = self.folder / "munge.socket"
        # pytest's folders belong to their user alone, which munged only accepts by --force
        self._daemon("munged", "--foreground", "--force", *(f"{option}={path}" for option, path in own.items()))
        eventually((self.folder / "munge.socket").exists, "munged listens", 30)
        self._daemon("slurmctld", "-D", "-i")
        for node in NODES:
            self._daemon("slurmd", "-D", "-N", node)
        eventually(lambda: self._idle() == len(NODES), "both nodes are idle", 60)

    def _idle(self) -> int:
        result = subprocess.run(
            ["sinfo", "--noheader", "--Node", "--format=%t"],
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        return result.stdout.split().count("idle")

    def _daemon(self, *command: str) -> None:
        with (self.folder / f"{command[0]}-{len(self._daemons)}.log").open("wb") as log:
            self._daemons.append(subprocess.Popen(command, env=self.environment, stdout=log, stderr=log))

    def stop(self) -> None:
        """End all jobs and the daemons."""
        subprocess.run(["scancel", "--user=root"], env=self.environment, check=False, timeout=60)
        deadline = time.monotonic() + 30
        while self.slurm("squeue", "--noheader").strip() and time.monotonic() < deadline:
            time.sleep(0.2)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in reversed(self._daemons):
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


@contextmanager
def running(folder: Path) -> Iterator[Cluster]:
    """A cluster below ``folder`` until the block ends."""
    cluster = Cluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
