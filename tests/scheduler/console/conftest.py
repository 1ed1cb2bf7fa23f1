from pathlib import Path

import pytest

from scheduler.config import Config, ConsoleConfig
from tests.scheduler.console.reports import Bench
from tests.scheduler.console.serving import PASSWORD
from tests.scheduler.core.drive import make


@pytest.fixture
def protected(tmp_path: Path) -> Config:
    """The settings of a console behind a password."""
    file = tmp_path / "password"
    file.write_text(f"{PASSWORD}\n")
    return Config(console=ConsoleConfig(password_file=str(file)))


@pytest.fixture
def bench() -> Bench:
    """One request of Alice's waits."""
    bench = Bench(make(running=2))
    bench.submit("alice/one", prompt=4)
    return bench
