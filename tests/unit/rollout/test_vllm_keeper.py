"""A server that does not end when it is asked to leaves no shared memory behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from megatron_aligndistil.rollout import vllm_keeper

SERVER = """
import signal, time
from multiprocessing.shared_memory import SharedMemory
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(SharedMemory(create=True, size=4096).name, flush=True)
time.sleep(600)
"""


def test_a_stubborn_server_is_killed_and_its_shared_memory_given_back(tmp_path: Path) -> None:
    folder = tmp_path / "handover"
    folder.mkdir()
    command = [sys.executable, vllm_keeper.__file__, str(os.getpid()), str(folder), sys.executable, "-c", SERVER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as keeper:
        assert keeper.stdout is not None
        shared = Path("/dev/shm", keeper.stdout.readline().strip().lstrip("/"))
        started = psutil.Process(keeper.pid).children(recursive=True)
        assert shared.exists() and len(started) == 2, "the server, and Python's tracker of its shared memory"
        keeper.terminate()
        assert keeper.wait(4 * vllm_keeper.GRACE_SECONDS) == 128 + signal.SIGKILL
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in started)
    assert not shared.exists() and not folder.exists()
