"""A real PostgreSQL for tests: one cluster for each test process, an empty database for each test."""

from collections.abc import Iterator

import psycopg
import pytest

from benchmarks.database import cluster


def emptied(url: str) -> str:
    """The same database without a journal in it."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("SET client_min_messages = warning")
        connection.execute("DROP SCHEMA IF EXISTS tokenbus CASCADE")
    return url


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    with cluster("fsync=off", "deadlock_timeout=20ms") as url:
        yield url


@pytest.fixture
def database(postgres: str) -> str:
    return emptied(postgres)
