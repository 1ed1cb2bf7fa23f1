"""The tenants' client against a real broker and a small service of the test's own (``answering.py``)."""

import asyncio
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path

import msgspec
import pytest

from protocol import topics
from protocol.chat import FunctionCall, ToolCall
from protocol.client import Client, RequestCancelled, RequestExpired, Stream
from protocol.errors import ErrorBody, RequestError
from protocol.openai import Answer, Usage, answer, piece
from protocol.replies import Accepted, Cancelled, Chunk, Expired, Failed, Result, Status, Timings, encode
from protocol.request import Message, Request
from protocol.topics import TopicError
from protocol.transport import BrokerAddress, PayloadTooLarge, PublishRefused, Transport, TransportError
from scheduler.mqtt.broker import EmbeddedBroker
from tests.protocol.answering import PIECES, Call, Service, chunk, result, whole

CHAT = Request(messages=[Message("user", "hello")])
PROMPT = Request(prompt="hello")

Serve = Callable[[Callable[[Call], Awaitable[None]]], Service]


@pytest.fixture
async def serve(address: BrokerAddress) -> AsyncIterator[Serve]:
    """Start the service with a way to respond."""
    subscriptions = [(topics.REQUESTS, 1), (topics.CANCELS, 1)]
    tasks: list[asyncio.Task[None]] = []
    async with Transport(address, identifier="service", subscriptions=subscriptions, session_expiry_s=60) as transport:

        def start(respond: Callable[[Call], Awaitable[None]]) -> Service:
            service = Service(transport)
            tasks.append(asyncio.create_task(service.serve(respond), name="fake service"))
            return service

        yield start
        for task in tasks:
            task.cancel()
            await asyncio.wait({task})
            assert task.cancelled(), task.exception()


@pytest.fixture
async def client(broker: EmbeddedBroker) -> AsyncIterator[Client]:
    async with Client(broker.url, tenant="alice") as connected:
        yield connected


async def read(stream: Stream) -> list[Chunk]:
    async with asyncio.timeout(20):
        return [received async for received in stream]


@pytest.mark.parametrize("request_body", [CHAT, PROMPT], ids=["chat", "completion"])
async def test_stream_yields_chunks_in_order_and_then_has_the_result(
    serve: Serve, client: Client, request_body: Request
) -> None:
    service = serve(whole)
    stream = client.stream(request_body, model="m")
    with pytest.raises(RuntimeError, match="ended"):
        stream.result  # noqa: B018 (reading it is what is tested)
    chunks = await read(stream)
    assert [(received.seq, received.text) for received in chunks] == list(enumerate(PIECES))
    assert stream.result == result(stream.request_id, chat=request_body.is_chat)
    assert service.requests == [stream.request_id]
    assert service.cancels.empty()


async def test_complete_returns_the_result_under_the_given_id(serve: Serve, client: Client) -> None:
    serve(whole)
    assert await client.complete(CHAT, model="m", request_id="mine") == result("mine")


async def test_many_streams_at_once_don_t_mix(serve: Serve, client: Client) -> None:
    serve(whole)
    ids = [f"r{number}" for number in range(50)]
    results = await asyncio.gather(*(client.complete(CHAT, model="m", request_id=name) for name in ids))
    assert [received.request_id for received in results] == ids


@pytest.mark.parametrize("request_body", [CHAT, PROMPT], ids=["chat", "completion"])
@pytest.mark.parametrize("arriving", [(), (0,), (0, 1), (0, 1, 3), (0, 3), (1, 2, 3), (0, 1, 2)], ids=str)
async def test_lost_chunks_come_with_the_result(
    serve: Serve, client: Client, arriving: tuple[int, ...], request_body: Request
) -> None:
    async def lossy(call: Call) -> None:
        await call.say(Accepted(call.id), *call.chunks(*arriving), call.result())

    serve(lossy)
    stream = client.stream(request_body, model="m")
    chunks = await read(stream)
    assert "".join(received.text for received in chunks) == stream.result.text == "".join(PIECES)
    assert [received.seq for received in chunks] == list(range(len(chunks)))
    assert chunks[-1].data.choices[0].finish_reason == "stop"
    assert type(chunks[-1].data) is type(chunk("", 0, "", chat=request_body.is_chat).data)


@pytest.mark.parametrize("arriving", [0, 1, 2])
async def test_lost_tool_calls_come_with_the_result(serve: Serve, client: Client, arriving: int) -> None:
    calls = [ToolCall(f"c{number}", FunctionCall("look", "{}")) for number in range(2)]
    common = {"chat": True, "created": 1, "model": "m"}

    async def lossy(call: Call) -> None:
        await call.accept()
        for number in range(arriving):
            told = {"text": "", "calls": [calls[number]], "calls_before": number}
            data = piece(request_id=call.id, reason=None, first=not number, **told, **common)
            await call.say(Chunk(call.id, number, data))
        whole = answer(request_id=call.id, answers=[Answer("", "tool_calls", calls)], usage=Usage(1, 2, 3), **common)
        await call.say(Result(call.id, whole, Timings(0.0, 0.1, 0.2), 3))

    serve(lossy)
    stream = client.stream(CHAT, model="m")
    heard = [delta for received in await read(stream) for delta in received.calls]
    assert [(delta.index, delta.id) for delta in heard] == [(0, "c0"), (1, "c1")]
    assert (stream.result.calls, stream.result.finish_reason) == (calls, "tool_calls")


@pytest.mark.parametrize("arriving", range(6))
async def test_what_is_lost_of_several_choices_comes_with_the_result(
    serve: Serve, client: Client, arriving: int
) -> None:
    texts = {0: "one two", 1: "three", 2: ""}
    pieces = [(0, "one", None), (1, "three", "stop"), (0, " two", None), (2, "", "stop"), (0, "", "length")]
    common = {"chat": True, "created": 1, "model": "m", "request_id": "r"}

    async def lossy(call: Call) -> None:
        await call.accept()
        for seq, (index, text, reason) in enumerate(pieces[:arriving]):
            first = all(index != other for other, _, _ in pieces[:seq])
            data = piece(text=text, reason=reason, first=first, index=index, **common)
            await call.say(Chunk(call.id, seq, data))
        answers = [Answer(texts[0], "length"), Answer(texts[1], "stop"), Answer(texts[2], "stop")]
        whole = answer(answers=answers, usage=Usage(1, 2, 3), **common)
        await call.say(Result(call.id, whole, Timings(0.0, 0.1, 0.2), len(pieces)))

    serve(lossy)
    chunks = await read(client.stream(CHAT, model="m", request_id="r"))
    heard, reasons = dict.fromkeys(texts, ""), {}
    for received in chunks:
        (choice,) = received.data.choices
        assert (choice.delta.role == "assistant") == (choice.index not in {c.index for c in chunks[: received.seq]})
        heard[choice.index] += choice.text
        reasons[choice.index] = choice.finish_reason
    assert heard == texts
    assert reasons == {0: "length", 1: "stop", 2: "stop"}
    assert [received.seq for received in chunks] == list(range(len(chunks)))


async def test_repeated_chunks_are_dropped(serve: Serve, client: Client) -> None:
    async def repeating(call: Call) -> None:
        await call.say(Accepted(call.id), *call.chunks(0, 0, 1, 0, 1, 2, 1, 2, 3, 3), call.result())

    serve(repeating)
    chunks = await read(client.stream(CHAT, model="m"))
    assert [(received.seq, received.text) for received in chunks] == list(enumerate(PIECES))


async def test_result_that_contradicts_the_stream_raises(serve: Serve, client: Client) -> None:
    async def contradicting(call: Call) -> None:
        await call.say(Accepted(call.id), *call.chunks(0), result(call.id, ["two"]))

    serve(contradicting)
    with pytest.raises(RequestError, match="begin with"):
        await read(client.stream(CHAT, model="m"))


async def test_failure_raises_the_services_error(serve: Serve, client: Client) -> None:
    body = ErrorBody("no such model", "model_not_found", param="model")

    async def failing(call: Call) -> None:
        await call.say(Failed(call.id, body))

    service = serve(failing)
    with pytest.raises(RequestError) as failed:
        await client.complete(CHAT, model="m")
    assert failed.value.body == body
    assert service.cancels.empty()


async def test_reply_that_can_t_be_read_raises(serve: Serve, client: Client) -> None:
    async def garbling(call: Call) -> None:
        await call.service.transport.publish(call.response_topic, b'{"type":"later invention"}')

    serve(garbling)
    with pytest.raises(msgspec.ValidationError):
        await client.complete(CHAT, model="m")


async def test_cancelling_ends_the_stream_with_its_own_error(serve: Serve, client: Client) -> None:
    calls: list[Call] = []

    async def slow(call: Call) -> None:
        calls.append(call)
        await call.say(Accepted(call.id), *call.chunks(0))

    service = serve(slow)
    async with aclosing(aiter(client.stream(CHAT, model="m", request_id="r"))) as chunks:
        assert (await anext(chunks)).seq == 0
        await client.cancel("r")
        assert await service.cancels.get() == "r"
        await calls[0].say(Cancelled("r", 7))
        with pytest.raises(RequestCancelled) as cancelled:
            await anext(chunks)
    assert cancelled.value.completion_tokens == 7
    assert service.cancels.empty()


async def test_expiry_ends_the_stream_with_its_own_error(serve: Serve, client: Client) -> None:
    async def too_slow(call: Call) -> None:
        await call.say(Accepted(call.id), *call.chunks(0), Expired(call.id, 7))

    service = serve(too_slow)
    with pytest.raises(RequestExpired, match="request r expired after 7 tokens") as expired:
        await client.complete(CHAT, model="m", request_id="r")
    assert (expired.value.request_id, expired.value.completion_tokens) == ("r", 7)
    await client.cancel("next")
    assert await service.cancels.get() == "next", "what has expired isn't cancelled"


async def test_a_deadline_is_sent_as_the_messages_expiry_too_and_runs_on_while_it_is_sent_again(
    serve: Serve, client: Client
) -> None:
    async def hard_of_hearing(call: Call) -> None:
        if call.attempt == 3:
            await whole(call)

    service = serve(hard_of_hearing)
    await client.complete(msgspec.structs.replace(CHAT, deadline_ms=1_200), model="m")
    await client.complete(CHAT, model="m")
    assert service.lifetimes_s == [2, 1, 1, None, None, None], "rounded up, and never nothing"


async def accept_and_start(call: Call) -> None:
    await call.say(Accepted(call.id), *call.chunks(0))


async def test_leaving_the_loop_cancels(serve: Serve, client: Client) -> None:
    service = serve(accept_and_start)
    async for received in client.stream(CHAT, model="m", request_id="r"):
        assert received.seq == 0
        break
    async with asyncio.timeout(5):
        assert await service.cancels.get() == "r"


async def test_cancelling_the_reading_task_cancels(serve: Serve, client: Client) -> None:
    service = serve(accept_and_start)
    reading = asyncio.create_task(client.complete(CHAT, model="m", request_id="r"))
    await service.arrived.wait()
    reading.cancel()
    async with asyncio.timeout(5):
        assert await service.cancels.get() == "r"
    assert reading.cancelled()


async def test_closing_the_client_cancels_what_still_runs(broker: EmbeddedBroker, serve: Serve) -> None:
    service = serve(accept_and_start)
    async with Client(broker.url, tenant="alice") as client:
        reading = asyncio.create_task(client.complete(CHAT, model="m", request_id="read"))
        left_alone = aiter(client.stream(CHAT, model="m", request_id="left-alone"))
        await anext(left_alone)
        await service.arrived.wait()
    async with asyncio.timeout(5):
        assert {await service.cancels.get(), await service.cancels.get()} == {"read", "left-alone"}
        with pytest.raises(TransportError, match="closed"):
            await reading
        with pytest.raises(TransportError, match="closed"):
            await anext(left_alone)
    assert service.cancels.empty()


async def test_caller_s_own_exception_leaves_the_client_unwrapped(broker: EmbeddedBroker) -> None:
    with pytest.raises(ZeroDivisionError):
        async with Client(broker.url, tenant="alice"):
            1 / 0  # noqa: B018 (raising is its use)


async def test_request_is_sent_again_until_accepted(serve: Serve, client: Client) -> None:
    async def hard_of_hearing(call: Call) -> None:
        if call.attempt == 3:
            await whole(call)

    service = serve(hard_of_hearing)
    stream = client.stream(CHAT, model="m")
    assert len(await read(stream)) == len(PIECES)
    assert service.requests == [stream.request_id] * 3


async def test_request_that_nobody_answers_times_out_and_is_cancelled(broker: EmbeddedBroker, serve: Serve) -> None:
    async def deaf(call: Call) -> None:
        pass

    service = serve(deaf)
    async with Client(broker.url, tenant="alice", accept_timeout_s=0.3) as client:
        with pytest.raises(TimeoutError, match=r"within 0\.3 s: the service didn't answer"):
            await client.complete(CHAT, model="m", request_id="r")
        async with asyncio.timeout(5):
            assert await service.cancels.get() == "r"


async def test_request_that_nobody_listens_for_says_so(broker: EmbeddedBroker) -> None:
    async with Client(broker.url, tenant="alice", accept_timeout_s=0.3) as client:
        with pytest.raises(TimeoutError, match="no service listens"):
            await client.complete(CHAT, model="m")


async def test_replies_lost_with_the_broker_are_asked_for_again(
    broker: EmbeddedBroker, serve: Serve, client: Client
) -> None:
    """The broker forgets the client's session; the result is published while nobody is subscribed."""

    async def joining(call: Call) -> None:
        if call.attempt == 1:
            await call.say(Accepted(call.id), *call.chunks(0, 1))
        else:
            await call.say(Accepted(call.id), call.result())

    service = serve(joining)
    texts: list[str] = []
    async with asyncio.timeout(20):
        async for received in client.stream(CHAT, model="m", request_id="r"):
            texts.append(received.text)
            if received.seq == 1:
                await broker.restart(signal.SIGKILL)
    assert texts == ["one", " two", " three"]
    assert service.requests == ["r", "r"]


async def test_clients_of_one_tenant_don_t_hear_each_other(broker: EmbeddedBroker, serve: Serve) -> None:
    async def named(call: Call) -> None:
        assert call.request.user is not None
        await call.say(Accepted(call.id), result(call.id, [call.request.user]))

    serve(named)
    async with Client(broker.url, tenant="alice") as one, Client(broker.url, tenant="alice") as two:
        answers = await asyncio.gather(
            one.complete(Request(prompt="x", user="one"), model="m", request_id="same"),
            two.complete(Request(prompt="x", user="two"), model="m", request_id="same"),
        )
    assert [received.text for received in answers] == ["one", "two"]


async def test_same_request_can_t_be_streamed_twice_at_once(serve: Serve, client: Client) -> None:
    serve(accept_and_start)
    async with aclosing(aiter(client.stream(CHAT, model="m", request_id="r"))) as chunks:
        await anext(chunks)
        with pytest.raises(ValueError, match="already"):
            await client.complete(CHAT, model="m", request_id="r")


async def test_names_outside_the_grammar_are_refused_before_sending(client: Client) -> None:
    with pytest.raises(TopicError):
        client.stream(CHAT, model="a/b")
    with pytest.raises(TopicError):
        client.stream(CHAT, model="m", request_id="+")


async def test_refusals_by_the_broker_reach_the_caller(tmp_path: Path) -> None:
    acl = tmp_path / "acl"
    acl.write_text("pattern write tokenbus/v1/%u/req/#\npattern write tokenbus/v1/%u/cancel/#\n")
    acl.chmod(0o600)
    settings = [f"acl_file {acl}", "max_packet_size 2000"]
    async with EmbeddedBroker(data_dir=tmp_path / "broker", settings=settings) as broker:
        async with Client(broker.url, tenant="bob", username="alice", password="any") as client:
            with pytest.raises(PublishRefused) as refused:
                await client.complete(CHAT, model="m")
            assert refused.value.code == 135
            with pytest.raises(PublishRefused):
                await client.cancel("r")
        async with Client(broker.url, tenant="alice", username="alice", password="any") as client:
            with pytest.raises(PayloadTooLarge):
                await client.complete(Request(prompt="x" * 3000), model="m")


async def test_wait_online_sees_a_service_that_is_there_and_one_that_comes(
    address: BrokerAddress, client: Client
) -> None:
    online = Status("online", model="m", max_model_len=100, max_running=4)
    async with Transport(address) as service, asyncio.timeout(10):
        await service.publish(topics.status("a"), encode(Status("offline")), retain=True)
        waiting = asyncio.create_task(client.wait_online())
        await asyncio.sleep(0.1)
        assert not waiting.done()
        await service.publish(topics.status("a"), encode(online), retain=True)
        assert await waiting == online
        assert await client.wait_online() == online
