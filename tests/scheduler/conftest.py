from pathlib import Path

import pytest


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "journal.sqlite3"


@pytest.fixture(params=["sqlite", "postgres"])
def place(request) -> Path | str:
    """Where a journal is kept."""
    return request.getfixturevalue("path" if request.param == "sqlite" else "database")
