"""What was asked and answered before, by content: an interrupted evaluation goes on, and asks nothing twice."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_aligndistil.config.json_text import parse_json
from megatron_aligndistil.errors import DataError, reason

FILE = "evaluation.sqlite"
_LOCKED_SECONDS = 60.0  # how long to wait for another process that writes


class ContentCache:
    """JSON values under the SHA-256 of what they were made of; every ``put`` is on the disk when it returns.

    Threads and processes may share one. Its folder is made at the first use.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None

    def get(self, made_of: Mapping[str, Any]) -> Any | None:
        """The value that was made of ``made_of``, None where there is none.

        Raises:
            DataError: the file is damaged or cannot be read.
        """
        with self._open() as connection:
            row = connection.execute("SELECT value FROM made WHERE key = ?", (key_of(made_of),)).fetchone()
            return None if row is None else parse_json(row[0])

    def put(self, made_of: Mapping[str, Any], value: Any) -> None:
        """Keep ``value``, which must not be None.

        Raises:
            DataError: the file is damaged or cannot be written.
        """
        with self._open() as connection, connection:
            row = (key_of(made_of), json.dumps(value, ensure_ascii=False))
            connection.execute("INSERT OR REPLACE INTO made VALUES (?, ?)", row)

    def check(self) -> None:
        """Make the file where there is none.

        Raises:
            DataError: it is damaged or cannot be written.
        """
        with self._open():
            pass

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                if self._connection is None:
                    self.path.parent.mkdir(parents=True, exist_ok=True)
                    self._connection = sqlite3.connect(self.path, timeout=_LOCKED_SECONDS, check_same_thread=False)
                    self._connection.execute("CREATE TABLE IF NOT EXISTS made (key TEXT PRIMARY KEY, value TEXT)")
                yield self._connection
            except (sqlite3.Error, OSError, ValueError) as error:
                raise DataError(
                    f"{self.path}: cannot be used as a cache ({reason(error)}); remove it, or set another cache_dir"
                ) from error


def key_of(made_of: Mapping[str, Any]) -> str:
    """SHA-256 of a mapping's JSON, whatever the order of its keys."""
    text = json.dumps(made_of, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
