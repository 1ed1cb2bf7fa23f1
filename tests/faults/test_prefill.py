"""Embeddings and scores among generations, whatever is killed meanwhile."""

import asyncio
import os
import random
import signal

import pytest

from protocol.client import Client
from protocol.errors import RequestError
from protocol.prefill import EmbeddingRequest, ScoreRequest
from protocol.replies import Result
from tests.faults.load import ask, requests
from tests.faults.service import Ear, ServiceProcess

pytestmark = pytest.mark.timeout(180)


def prefills(count: int) -> dict[str, EmbeddingRequest | ScoreRequest]:
    """Of every kind, several chunks long."""
    draw = random.Random(count)

    def tokens(longest: int) -> list[int]:
        return [draw.randrange(3, 90) for _ in range(draw.randint(100, longest))]

    asked: dict[str, EmbeddingRequest | ScoreRequest] = {}
    for number in range(0, count, 3):
        asked[f"mean{number}"] = EmbeddingRequest(input=[tokens(900), tokens(300)], pooling="mean")
        asked[f"last{number}"] = EmbeddingRequest(input=tokens(900), encoding_format="base64")
        asked[f"score{number}"] = ScoreRequest(text=tokens(500), context=tokens(300))
    return asked


def told(result: Result) -> list[float]:
    """All its numbers."""
    vectors = result.embeddings or [result.score.logprobs.token_logprobs]
    return [number for vector in vectors for number in vector]


async def complete(client: Client, asked: dict, prefix: str = "") -> dict[str, Result]:
    async def one(id: str) -> tuple[str, Result]:
        return id, await client.complete(asked[id], model="tiny", request_id=prefix + id)

    return dict(await asyncio.gather(*map(one, asked)))


async def test_killing_the_worker_then_the_service_costs_nobody_an_answer(tmp_path, broker, model):
    asked, texts = prefills(24), requests(4, longest=200)
    async with (
        ServiceProcess(tmp_path, model, broker.url) as service,
        Client(broker.url, tenant="alice") as alice,
        Client(broker.url, tenant="bob") as bob,
        Ear(broker.url, "alice", "bob") as ear,
    ):
        expected = await complete(alice, asked, "reference-")
        expected_texts = await ask([bob], texts, "reference-")
        begun = asyncio.Event()
        asking_texts = asyncio.create_task(ask([bob], texts, on_chunk=begun.set), name="texts")
        await begun.wait()
        asking = asyncio.create_task(complete(alice, asked), name="prefills")
        while not (await service.metrics())["tokenbus_outstanding_requests"] > 20:
            pass
        os.kill(service.worker_pid, signal.SIGKILL)
        while not (await service.metrics())["tokenbus_worker_restarts_total"]:
            pass
        assert not asking.done()
        await service.stop(signal.SIGKILL)
        await service.start()
        results = await asking
        assert {id: result.text for id, result in (await asking_texts).items()} == {
            id: result.text for id, result in expected_texts.items()
        }
        metrics = await service.settled()
        again = await alice.complete(asked["mean0"], model="tiny", request_id="mean0")
        with pytest.raises(RequestError) as conflict:
            await alice.complete(asked["last0"], model="tiny", request_id="mean0")
        assert await service.stop(signal.SIGTERM) == 0
    assert conflict.value.code == "id_conflict"
    assert again == results["mean0"]
    assert max(result.attempt for result in results.values()) == 2
    assert metrics['tokenbus_requests_total{outcome="computed"}'] > 0
    for id, result in results.items():
        assert told(result) == told(expected[id]), id
        assert len(ear.terminal(id)) == (3 if id == "mean0" else 1)
