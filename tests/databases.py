"""A real PostgreSQL for tests: one cluster for each test process, one empty database for each test."""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

_HINT = "these tests need PostgreSQL's initdb and postgres: deploy/packages.sh installs them (Debian: postgresql)"


def _program(name: str) -> str:
    """On the path, or where Debian keeps it, of the newest version."""
    found = shutil.which(name) or max(map(str, Path("/usr/lib/postgresql").glob(f"*/bin/{name}")), default=None)
    assert found is not None, _HINT
    return found


def _user() -> dict[str, object]:
    """PostgreSQL refuses to run as root."""
    return {"user": "nobody", "group": "nogroup", "extra_groups": ()} if os.geteuid() == 0 else {}


@contextlib.contextmanager
def cluster() -> Iterator[str]:
    """The URL of a running one, on a socket of its own, that syncs nothing to the disk; all is gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))  # a socket's path must be short
    if as_other := _user():
        shutil.chown(folder, as_other["user"], as_other["group"])
    try:
        subprocess.run(
            [
                _program("initdb"),
                "-D",
                folder / "data",
                "-U",
                "tester",
                "-A",
                "trust",
                "-N",
                "-E",
                "UTF8",
                "--locale=C",
            ],
            check=True,
            capture_output=True,
            cwd=folder,
            **as_other,
        )
        settings = ("fsync=off", "listen_addresses=", f"unix_socket_directories={folder}", "deadlock_timeout=20ms")
        with (folder / "log").open("wb") as log:
            server = subprocess.Popen(
                [_program("postgres"), "-D", folder / "data", *(f"-c{setting}" for setting in settings)],
                stdout=log,
                stderr=log,
                cwd=folder,
                **as_other,
            )
        try:
            url = f"postgresql://tester@/postgres?host={folder}"
            _wait_up(url, server, folder / "log")
            yield url
        finally:
            server.send_signal(signal.SIGQUIT)
            server.wait()
    finally:
        shutil.rmtree(folder)


def _wait_up(url: str, server: subprocess.Popen, log: Path) -> None:
    while True:
        assert server.poll() is None, log.read_text()
        with contextlib.suppress(psycopg.OperationalError), psycopg.connect(url):
            return


def emptied(url: str) -> str:
    """The same database without a journal in it."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("SET client_min_messages = warning")
        connection.execute("DROP SCHEMA IF EXISTS tokenbus CASCADE")
    return url


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    with cluster() as url:
        yield url


@pytest.fixture
def database(postgres: str) -> str:
    return emptied(postgres)
