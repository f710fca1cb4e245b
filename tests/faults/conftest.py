"""One setting for all faults."""

from __future__ import annotations

import pytest

from tests.faults.setting import Setting


@pytest.fixture(scope="session")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tmp_path_factory.mktemp("faults"))
