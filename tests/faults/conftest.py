from pathlib import Path

import pytest

from tests.workers.models import servable


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return servable(tmp_path_factory.mktemp("faults") / "model")
