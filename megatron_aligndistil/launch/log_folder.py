"""A run's log folder: where it is, and that one run at a time writes into it. No torch here."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_aligndistil.config.base_schema import ExpManagerConfig
from megatron_aligndistil.errors import ConfigError

logger = logging.getLogger(__name__)

LOCK = ".lock"


def log_directory(exp_manager: ExpManagerConfig) -> Path:
    """Where the run's results go; ``~`` is the home folder.

    Raises:
        ConfigError: the folder is named twice, as a whole and in parts.
    """
    explicit = exp_manager.explicit_log_dir
    for key in ("exp_dir", "version"):
        value = getattr(exp_manager, key)
        if explicit and value is not None:
            raise ConfigError(
                f"exp_manager.{key}={value}: has no effect with exp_manager.explicit_log_dir={explicit}; remove one of "
                "them"
            )
    folder = Path(explicit or Path(exp_manager.exp_dir or "runs", exp_manager.name, exp_manager.version or ""))
    return folder.expanduser()


def cannot_write(folder: Path, error: OSError) -> ConfigError:
    """What is said of a log folder that cannot be made or written."""
    return ConfigError(
        f"exp_manager.explicit_log_dir={folder}: cannot write there ({error.strerror or error}); choose another"
    )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other runs out of ``folder`` until this process ends, however it ends; made where it is missing.

    A POSIX lock: no writer process that a killed run has left behind holds it, and network file systems know it.

    Raises:
        ConfigError: another run is in there, or nothing can be written.
    """
    path, is_new = folder / LOCK, not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise cannot_write(folder, error) from error
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            raise ConfigError(
                f"exp_manager.explicit_log_dir={folder}: another run is writing there ({file.read().strip()}); stop "
                "it, or choose another exp_manager.name"
            ) from error
        except OSError as error:
            logger.warning("%s: this file system knows no locks (%s): nothing keeps a second run out", folder, error)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        try:
            yield
        finally:
            if is_new and os.listdir(folder) == [LOCK]:  # it has come to nothing
                with suppress(OSError):
                    path.unlink()
                    folder.rmdir()
