"""The replicas of a shared journal: who lives, and what each has done for every tenant."""

from collections.abc import Mapping, Sequence
from typing import Any, LiteralString, NamedTuple


class Usage(NamedTuple):
    """What a replica has of a tenant's, and did for it since it started.

    ``outstanding``: accepted requests that haven't ended. ``requests`` and ``tokens`` were paid from its quota; ``service``
    is in units of the Virtual Token Counter, divided by the tenant's weight.
    """

    outstanding: int = 0
    requests: int = 0
    tokens: int = 0
    service: float = 0.0


class News(NamedTuple):
    """What a replica hears of the others with its heartbeat.

    ``loads``: of those that live, by their numbers. ``usage``: of those tenants for whom it may have changed, by replica.
    """

    loads: dict[int, float]
    usage: dict[int, dict[str, Usage]]


#: A statement and its values.
Statement = tuple[LiteralString, Sequence[object] | Mapping[str, object]]

#: Who lives holds a lease that hasn't run out, by the database's clock.
SCHEMA = """
CREATE TABLE tokenbus.replicas (
    number bigint PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
    name text NOT NULL,
    lease_s float8 NOT NULL,
    load float8 NOT NULL DEFAULT 0,
    expires_at timestamptz NOT NULL DEFAULT '-infinity'
);
CREATE VIEW tokenbus.live AS SELECT number FROM tokenbus.replicas WHERE expires_at > clock_timestamp();
CREATE TABLE tokenbus.usage (
    replica bigint REFERENCES tokenbus.replicas ON DELETE CASCADE,
    tenant text,
    outstanding bigint NOT NULL,
    requests bigint NOT NULL,
    tokens bigint NOT NULL,
    service float8 NOT NULL,
    changed_at timestamptz NOT NULL,
    PRIMARY KEY (replica, tenant)
);
CREATE INDEX usage_by_change ON tokenbus.usage (changed_at);
"""

#: A name's earlier processes are dead: there is one MQTT session for both.
JOIN = "INSERT INTO tokenbus.replicas (name, lease_s) VALUES (%s, %s) RETURNING number"
SUCCEED = "DELETE FROM tokenbus.replicas WHERE name = %s AND number < %s"
LEAVE = "DELETE FROM tokenbus.replicas WHERE number = %s"

_RENEW = """
INSERT INTO tokenbus.replicas (number, name, lease_s, load, expires_at)
OVERRIDING SYSTEM VALUE VALUES (%s, %s, %s, %s, clock_timestamp() + make_interval(secs => %s))
ON CONFLICT (number) DO UPDATE SET load = EXCLUDED.load, expires_at = EXCLUDED.expires_at
"""
_BURY = """
DELETE FROM tokenbus.replicas WHERE number IN (
    SELECT number FROM tokenbus.replicas WHERE expires_at <= clock_timestamp() FOR UPDATE SKIP LOCKED
)
"""
_TELL = """
INSERT INTO tokenbus.usage
SELECT %s, *, clock_timestamp() FROM unnest(%s::text[], %s::int8[], %s::int8[], %s::int8[], %s::float8[])
ON CONFLICT (replica, tenant) DO UPDATE SET outstanding = EXCLUDED.outstanding, requests = EXCLUDED.requests,
    tokens = EXCLUDED.tokens, service = EXCLUDED.service, changed_at = EXCLUDED.changed_at
"""
_OTHERS = "SELECT number, load FROM tokenbus.replicas WHERE number <> %s"
# A row becomes visible some time after its ``changed_at``: what was read before is read again, which changes nothing.
_HEAR = """
SELECT replica, tenant, outstanding, requests, tokens, service FROM tokenbus.usage
WHERE replica <> %s AND changed_at > clock_timestamp() - make_interval(secs => %s)
"""
_FOR_EVER_S = 1e9


def renew(number: int, name: str, lease_s: float, load: float) -> list[Statement]:
    """Hold the lease for ``lease_s`` from now on, and forget those whose own ran out.

    Who had been taken for dead comes back under its number.
    """
    return [(_RENEW, (number, name, lease_s, load, lease_s)), (_BURY, ())]


def exchange(number: int, lease_s: float, usage: dict[str, Usage], *, first: bool) -> list[Statement]:
    """Tell what changed here and ask what changed elsewhere, right after ``renew``."""
    tenants = sorted(usage)
    columns = [[usage[tenant][column] for tenant in tenants] for column in range(len(Usage._fields))]
    return [
        (_TELL, (number, tenants, *columns)),
        (_OTHERS, (number,)),
        (_HEAR, (number, _FOR_EVER_S if first else 2 * lease_s)),
    ]


def heard(rows: Sequence[Sequence[tuple[Any, ...]]]) -> News:
    """What the database answered to an exchange."""
    *_, others, usages = rows
    usage: dict[int, dict[str, Usage]] = {}
    for replica, tenant, *figures in usages:
        usage.setdefault(replica, {})[tenant] = Usage(*figures)
    return News(dict(others), usage)
