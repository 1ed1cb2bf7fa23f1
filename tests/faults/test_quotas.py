"""Tenants over their quotas: refused with what to do about it, then let in; and quotas that change under way."""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator

import pytest

from protocol import replies, topics
from protocol.client import Client
from protocol.errors import ErrorBody, RequestError
from protocol.replies import Accepted, Chunk, Failed, Reply, Result
from protocol.request import Request, encode_request
from protocol.transport import BrokerAddress, Transport
from tests.faults.service import ServiceProcess

pytestmark = pytest.mark.timeout(120)

SHORT = Request(prompt=[5, 6, 7], max_tokens=3, temperature=0.0, ignore_eos=True)
LONG = Request(prompt=[5, 6, 7], max_tokens=300, temperature=0.0, ignore_eos=True)


async def refusal(client: Client, request: Request = SHORT) -> ErrorBody:
    with pytest.raises(RequestError) as caught:
        await client.complete(request, model="tiny")
    return caught.value.body


async def test_who_is_over_a_quota_is_let_in_after_the_wait_told(tmp_path, broker, model):
    (tmp_path / "tokenbus.toml").write_text(
        """
        [limits]
        requests_per_s = 0.5
        max_context = 200
        [tenants.bob]
        requests_per_s = 1000
        tokens_per_min = 240
        max_context = 400
        """
    )
    async with (
        ServiceProcess(tmp_path, model, broker.url) as service,
        Client(broker.url, tenant="alice") as alice,
        Client(broker.url, tenant="bob") as bob,
    ):
        first = await alice.complete(SHORT, model="tiny", request_id="first")
        limited = await refusal(alice)
        assert (limited.code, limited.message) == ("rate_limited", "your limit is 0.5 requests per second")
        assert 0 < limited.retry_after_ms <= 2000
        assert (
            await alice.complete(SHORT, model="tiny", request_id="first")
        ).text == first.text  # replays all the same

        await asyncio.sleep(limited.retry_after_ms / 1000)
        for _ in range(3):  # and costs nothing
            await alice.complete(SHORT, model="tiny", request_id="first")
        assert (await alice.complete(SHORT, model="tiny", request_id="second")).text == first.text
        assert (await refusal(alice)).code == "rate_limited"

        too_long = await refusal(alice, LONG)
        assert (too_long.code, too_long.retry_after_ms) == ("context_length_exceeded", None)
        assert too_long.message.endswith("are over your limit of 200 tokens")

        begun = time.monotonic()
        assert (await bob.complete(LONG, model="tiny")).usage.total_tokens == 303
        limited = await refusal(bob)
        elapsed_ms = 1000 * (time.monotonic() - begun)
        assert limited.message == "your limit is 240 tokens per minute, prompts and answers together"
        wait_ms = 1000 * (303 - 240 + 3) / 4  # four tokens a second pay the debt, and the next prompt
        assert wait_ms - elapsed_ms < limited.retry_after_ms <= wait_ms
        metrics = await service.settled()
    assert metrics['tokenbus_rejections_total{reason="rate_limited"}'] == 3
    assert metrics['tokenbus_rejections_total{reason="context_length_exceeded"}'] == 1


class Everyone:
    """Sends for all tenants and hears all they are told, on one connection: in the order it was said."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._said = self._listen()

    async def ask(self, id: str, request: Request) -> None:
        """``id``: tenant and number."""
        await self._transport.publish(topics.request(id[:-1], "tiny", id), encode_request(request))

    async def told(self, id: str, kind: type[Reply]) -> Reply:
        """The next such reply to this request, past all others."""
        async with asyncio.timeout(30):
            while True:
                reply = await anext(self._said)
                if reply.request_id == id and isinstance(reply, kind):
                    return reply

    async def results(self, count: int) -> dict[str, str]:
        """The texts of the next results, as they come."""
        texts = {}
        while len(texts) < count:
            if isinstance(reply := await anext(self._said), Result):
                texts[reply.request_id] = reply.text
        return texts

    async def _listen(self) -> AsyncIterator[Reply]:
        async for incoming in self._transport.messages():
            self._transport.acknowledge(incoming)
            yield replies.decode_reply(incoming.payload)


@contextlib.contextmanager
def held_up(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def asked(number: int) -> Request:
    return Request(prompt=[5 + number, 6], max_tokens=20, temperature=0.0, ignore_eos=True)


async def test_a_reload_changes_weights_and_quotas_and_disturbs_nothing(tmp_path, broker, model):
    """The worker is held up meanwhile, so that one request runs and the others wait."""
    running = Request(prompt=[5], max_tokens=2000, temperature=0.0, ignore_eos=True, stream=True)
    subscriptions = [(topics.out(tenant, "#"), 1) for tenant in ("alice", "bob", "carol", "dave")]
    async with (
        ServiceProcess(tmp_path, model, broker.url, engine__max_running=1) as service,
        Client(broker.url, tenant="erin") as erin,
        Transport(BrokerAddress.parse(broker.url), subscriptions=subscriptions) as transport,
    ):

        async def reload(settings: str, logged: str) -> None:
            service.config.write_text(settings)
            service.process.send_signal(signal.SIGHUP)
            await service.until_logged(logged)

        alone = [(await erin.complete(asked(number), model="tiny")).text for number in range(6)]
        alone_long = (await erin.complete(running, model="tiny")).text
        everyone = Everyone(transport)
        await everyone.ask("carol0", running)
        await everyone.told("carol0", Chunk)
        with held_up(service.worker_pid):
            await reload(
                "[limits]\nmax_context = 5\n[tenants.alice]\nweight = 0", "not reloaded, the old ones hold: Expected"
            )
            await reload("[limits\n", "not reloaded, the old ones hold: " + str(service.config))
            for number in range(6):
                for tenant in ("bob", "alice"):
                    await everyone.ask(f"{tenant}{number}", asked(number))
                    await everyone.told(f"{tenant}{number}", Accepted)

            await reload(
                "[limits]\nmax_context = 5\n[tenants.alice]\nweight = 1000\n[engine]\nattempts = 7",
                "limits were reloaded",
            )
            assert "engine.attempts was changed: that needs a restart" in service.log.read_text()
            os.kill(service.worker_pid, signal.SIGHUP)  # as `systemctl kill` would, to every process
            await everyone.ask("dave0", asked(0))
            assert (await everyone.told("dave0", Failed)).error.code == "context_length_exceeded"
            await everyone.ask("bob5", asked(5))  # joins, though it is over the new limit
            await everyone.told("bob5", Accepted)

        texts = await everyone.results(13)
        metrics = await service.settled()
    assert texts == {"carol0": alone_long} | {
        f"{who}{number}": alone[number] for who in ("alice", "bob") for number in range(6)
    }
    order = [id for id in texts if id != "carol0"]
    assert order.index("alice5") <= 6, "of equal weight they take turns"
    assert metrics["tokenbus_worker_restarts_total"] == 0
    assert "Traceback" not in service.log.read_text()


async def test_a_reload_asked_for_while_it_starts_is_made_up_for(tmp_path, broker, model):
    service = ServiceProcess(tmp_path, model, broker.url)
    await service.start(wait=False)
    try:
        async with asyncio.timeout(60):
            while (await service.ask("/healthz"))[0] == 0:
                await asyncio.sleep(0.02)
        service.config.write_text("[limits]\nmax_context = 5\n")
        service.process.send_signal(signal.SIGHUP)
        assert (await service.ask("/readyz"))[0] == 503
        async with Client(broker.url, tenant="alice") as alice:
            assert (await refusal(alice)).code == "context_length_exceeded"
    finally:
        assert await service.stop(signal.SIGTERM) == 0
