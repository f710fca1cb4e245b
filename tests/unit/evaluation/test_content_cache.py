"""The cache by content: what is put is there for others, whatever happens; damage is one line."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from megatron_aligndistil.errors import DataError
from megatron_aligndistil.evaluation.content_cache import FILE, ContentCache, key_of


def test_values_are_kept_by_content(tmp_path: Path) -> None:
    cache = ContentCache(tmp_path / "new" / "folder")
    assert cache.get({"a": 1}) is None
    cache.put({"a": 1, "b": "ä \ud800"}, {"text": "ö", "n": [1, 2.5]})
    other = ContentCache(tmp_path / "new" / "folder")  # as another process would
    assert other.get({"b": "ä \ud800", "a": 1}) == {"text": "ö", "n": [1, 2.5]}
    assert other.get({"a": 1, "b": "ä"}) is None
    assert key_of({"a": 1}) != key_of({"a": "1"})


def test_threads_and_connections_write_at_once(tmp_path: Path) -> None:
    caches = [ContentCache(tmp_path), ContentCache(tmp_path)]

    def write(worker: int) -> None:
        for i in range(25):
            caches[worker % 2].put({"worker": worker, "i": i}, i)

    threads = [threading.Thread(target=write, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(caches[0].get({"worker": worker, "i": i}) == i for worker in range(4) for i in range(25))


def test_a_damaged_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"not a database" * 100)
    with pytest.raises(DataError, match=rf"{FILE}: cannot be used as a cache .*cache_dir"):
        ContentCache(tmp_path).get({"a": 1})


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be used as a cache"):
        ContentCache(tmp_path / "file" / "cache").put({"a": 1}, 1)
