"""What the way in and the way out count."""

import msgspec

from tests.scheduler.test_expiry import message, take
from tests.scheduler.test_recovery import Process


def value(process: Process, name: str) -> float | None:
    return process.metrics.registry.get_sample_value(name)


async def test_what_the_broker_or_a_tenant_sends_again_is_counted_apart(path):
    once = message()
    async with Process(path) as process:
        await process.recovery
        await take(process, once, msgspec.structs.replace(once, duplicate=True))
        assert value(process, "tokenbus_redeliveries_total") == 1
        assert value(process, "tokenbus_duplicate_requests_total") == 1
        await process.settle()
        await take(process, once)
        assert value(process, "tokenbus_redeliveries_total") == 1
        assert value(process, "tokenbus_duplicate_requests_total") == 2
        assert value(process, "tokenbus_requests_accepted_total") == 1


async def test_who_waits_is_who_never_ran(path):
    async with Process(path, fatal="a") as process:
        await process.recovery
        assert process.egress.oldest_waiting_s == 0
        await take(process, message(id="a"))
        first = process.egress.oldest_waiting_s
        assert 0 < first < process.egress.oldest_waiting_s, "it grows while nothing comes of the first step"
        assert process.egress.cancel("alice/a")
        assert process.egress.oldest_waiting_s == 0
        process.worker.release.set()
        await take(process, message(id="b"))
        await process.settle()
        assert process.egress.oldest_waiting_s == 0
