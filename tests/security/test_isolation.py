"""Alice tries everything on Bob, at a real service on the shipped broker.

Nothing reaches him, nothing of his leaks, and she is told.
"""

import asyncio
import contextlib
import random
import secrets
import sys

import pytest

from protocol import replies, topics
from protocol.client import Client
from protocol.prefill import EmbeddingRequest, ScoreRequest
from protocol.replies import Accepted, Failed, Result
from protocol.request import Request
from protocol.topics import TopicError
from protocol.transport import PublishRefused, Transport
from scheduler import parts
from tests.security.conftest import connected, heard

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]

SHORT = Request(prompt=[5, 6, 7], max_tokens=4, temperature=0.0, ignore_eos=True, stream=True)
LONG = Request(prompt=[5, 6, 7], max_tokens=2000, temperature=0.0, ignore_eos=True, stream=True)
BODY = b'{"prompt": [5, 6, 7], "max_tokens": 4}'
DROPPED = "$SYS/broker/publish/messages/dropped"
OWN = "tokenbus/v1/alice/out/"


def client(address, tenant: str) -> Client:
    """The tenants' own client, by whatever the address holds."""
    return Client(
        f"mqtts://{address}",
        tenant=tenant,
        username=address.username,
        password=address.password,
        ca_file=address.ca_file,
        cert_file=address.cert_file,
        key_file=address.key_file,
    )


@contextlib.asynccontextmanager
async def alice_and_bob(broker):
    """Both as bare clients who hear everything of their own."""
    async with (
        connected(broker.by_certificate("alice"), f"{OWN}#", "tokenbus/v1/alice/dead/#") as alice,
        connected(broker.by_password("bob"), "tokenbus/v1/bob/#") as bob,
    ):
        yield alice, bob


async def answers(transport: Transport, count: int) -> list:
    """The next answers, with their topics."""
    messages = []
    async with asyncio.timeout(20):
        while len(messages) < count:
            messages.append(await anext(transport.messages()))
            transport.acknowledge(messages[-1])
    return [(each.topic, replies.decode_reply(each.payload)) for each in messages]


async def hears_nothing_but_his_own(bob: Transport) -> None:
    """His next request gets its two answers, and nothing came before them."""
    id = secrets.token_hex(8)
    await bob.publish(topics.request("bob", "tiny", id), BODY)
    heard = await answers(bob, 2)
    assert [(topic, type(reply)) for topic, reply in heard] == [
        (f"tokenbus/v1/bob/out/{id}", Accepted),
        (f"tokenbus/v1/bob/out/{id}", Result),
    ]


async def test_both_are_served_under_the_same_id_and_hear_only_their_own(running, broker):
    async with (
        client(broker.by_certificate("alice"), "alice") as alice,
        client(broker.by_password("bob"), "bob") as bob,
    ):
        assert (await alice.wait_online()).model == "tiny"
        results = await asyncio.gather(
            alice.complete(SHORT, model="tiny", request_id="same"), bob.complete(SHORT, model="tiny", request_id="same")
        )
    assert [result.usage.completion_tokens for result in results] == [4, 4]
    assert results[0].text == results[1].text


async def test_both_may_ask_for_embeddings_and_scores(running, broker):
    async with (
        client(broker.by_certificate("alice"), "alice") as alice,
        client(broker.by_password("bob"), "bob") as bob,
    ):
        vectors = [
            await one.embed(EmbeddingRequest(input=[[5, 6, 7]]), model="tiny", request_id="vector")
            for one in (alice, bob)
        ]
        scores = [await one.score(ScoreRequest(text=[5, 6, 7]), model="tiny") for one in (alice, bob)]
    assert vectors[0][0] == pytest.approx(vectors[1][0], abs=1e-6)
    assert scores[0].cumulative_logprob == pytest.approx(scores[1].cumulative_logprob, abs=1e-5)


@pytest.mark.parametrize(
    "topic",
    [
        "tokenbus/v1/bob/req/tiny/r1",
        "tokenbus/v1/bob/embed/tiny/r1",
        "tokenbus/v1/bob/score/tiny/r1",
        "tokenbus/v1/bob/cancel/r1",
        "tokenbus/v1/bob/out/r1",
        "tokenbus/v1/bob/dead/r1",
        "tokenbus/v1/alice/out/r1",
        "tokenbus/v1/alice/dead/r1",
        "tokenbus/v1/_svc/main/status",
        "tokenbus/v1//req/tiny/r1",
        "tokenbus/v1/_svc/req/tiny/r1",
        "/tokenbus/v1/alice/req/tiny/r1",
        "$SYS/broker/uptime",
        "$CONTROL/dynamic-security/v1",
        "$share/g/tokenbus/v1/bob/req/tiny/r1",
    ],
)
async def test_alice_publishes_where_she_may_not(running, broker, topic):
    async with alice_and_bob(broker) as (alice, bob), connected(broker.by_password("bob"), topics.STATUS) as watcher:
        [online] = await heard(watcher, 0.1)
        for retain in (False, True):
            with pytest.raises(PublishRefused) as refused:
                await alice.publish(topic, BODY, retain=retain)
            assert refused.value.code == 135
        await hears_nothing_but_his_own(bob)
        assert await heard(watcher, 0.1) == []
        assert replies.decode_status(online.payload).status == "online"


LISTENING = [
    "#",
    "+/#",
    "tokenbus/#",
    "tokenbus/v1/+/out/#",
    "tokenbus/v1/+/req/#",
    "tokenbus/v1/+/embed/#",
    "tokenbus/v1/+/dead/#",
    "tokenbus/v1/bob/#",
    "$SYS/#",
    "$share/group/#",
    "$share/group/tokenbus/v1/bob/out/#",
]


async def test_alice_listens_everywhere_and_hears_only_her_own_and_the_status(running, broker):
    """Each filter on its own connection; none of them takes anything from Bob either."""
    async with contextlib.AsyncExitStack() as stack:
        spies = [await stack.enter_async_context(connected(broker.by_certificate("alice"), name)) for name in LISTENING]
        async with (
            client(broker.by_password("bob"), "bob") as bob,
            client(broker.by_certificate("alice"), "alice") as alice,
        ):
            result = await bob.complete(SHORT, model="tiny")
            await alice.complete(SHORT, model="tiny")
        assert result.usage.completion_tokens == 4
        caught = dict(zip(LISTENING, await asyncio.gather(*(heard(spy) for spy in spies)), strict=True))
    for name, messages in caught.items():
        allowed = (OWN, "tokenbus/v1/_svc/")
        assert all(message.topic.startswith(allowed) for message in messages), name
    assert any(message.topic.startswith(OWN) for message in caught["#"])  # the spies do listen
    assert caught["$SYS/#"] == []


@pytest.mark.parametrize(
    "response_topic",
    [
        "tokenbus/v1/bob/out/r1",
        "tokenbus/v1/bob/req/tiny/r1",
        "tokenbus/v1/alice/req/tiny/again",
        "tokenbus/v1/alice/outer/r1",
        "tokenbus/v1/_svc/main/status",
        "$SYS/broker/uptime",
        "$share/g/tokenbus/v1/bob/out/r1",
        "/",
        f"{OWN}+",
        f"{OWN}#",
        OWN + "/" * 200,  # Mosquitto would end the service's connection over it, again and again
    ],
)
async def test_alice_names_anothers_response_topic(running, broker, response_topic):
    async with alice_and_bob(broker) as (alice, bob):
        await alice.publish(topics.request("alice", "tiny", "r1"), BODY, response_topic=response_topic)
        [(topic, reply)] = await answers(alice, 1)
        assert topic == f"{OWN}r1"
        assert isinstance(reply, Failed)
        assert (reply.error.code, reply.error.param) == ("invalid_topic", "response_topic")
        await hears_nothing_but_his_own(bob)


async def test_whatever_response_topic_alice_makes_up_the_answer_is_in_her_own_tree(running, broker):
    draw = random.Random(13)
    pieces = ["tokenbus", "v1", "alice", "bob", "out", "req", "_svc", "..", "", "$SYS", "$share", "+", "#", "%u", "é"]
    async with alice_and_bob(broker) as (alice, bob):
        for number in range(100):
            made_up = "/".join(draw.choices(pieces, k=draw.randint(1, 6)))
            start = draw.choice(["", OWN, "tokenbus/v1/bob/out/"])
            await alice.publish(
                topics.request("alice", "tiny", f"r{number}"), BODY, response_topic=start + made_up or "/"
            )
        ended = 0
        while ended < 100:
            [(topic, reply)] = await answers(alice, 1)
            assert topic.startswith(OWN)
            ended += isinstance(reply, Failed | Result)
        await hears_nothing_but_his_own(bob)


@pytest.mark.parametrize("id", ["$SYS", "$share", "a/b", "/", "a b", "_svc", "ü", "x" * 65, ""])
async def test_alices_ids_outside_the_grammar(running, broker, id):
    async with alice_and_bob(broker) as (alice, bob):
        await alice.publish(f"tokenbus/v1/alice/req/tiny/{id}", BODY)
        [(topic, reply)] = await answers(alice, 1)
        assert topic.startswith(OWN)
        assert reply.error.code == "invalid_topic"
        await hears_nothing_but_his_own(bob)


@pytest.mark.parametrize("name", ["+", "#", "/", "$", "a/b", "../bob", "bob/out", "", "_svc", "\0"])
async def test_the_client_refuses_names_outside_the_grammar(running, broker, name):
    address = broker.by_certificate("alice")
    async with client(address, "alice") as alice:
        with pytest.raises(TopicError, match="request_id"):
            alice.stream(SHORT, model="tiny", request_id=name)
        with pytest.raises(TopicError, match="model"):
            alice.stream(SHORT, model=name)
        with pytest.raises(TopicError, match="request_id"):
            await alice.cancel(name)
    with pytest.raises(TopicError, match="tenant"):
        client(address, name)


async def test_the_client_of_another_tenant_is_refused_by_the_broker(running, broker):
    async with client(broker.by_certificate("alice"), "bob") as disguised:
        with pytest.raises(PublishRefused):
            await disguised.complete(SHORT, model="tiny")
        with pytest.raises(PublishRefused):
            await disguised.cancel("r1")


async def test_alice_cancels_only_her_own_request_of_the_same_id(running, broker):
    async with (
        client(broker.by_password("bob"), "bob") as bob,
        client(broker.by_certificate("alice"), "alice") as alice,
    ):
        stream = bob.stream(LONG, model="tiny", request_id="cancelled")
        async for chunk in stream:
            if chunk.seq == 2:
                await alice.cancel("cancelled")
        assert stream.result.usage.completion_tokens == 2000


async def test_alice_connects_under_anothers_identifier(running, broker):
    """The broker would hand her the session: the service's can't be guessed, and of Bob's she hears nothing."""
    async with (
        connected(broker.by_certificate("alice"), identifier="tokenbus-service-main") as alice,
        client(broker.by_password("bob"), "bob") as bob,
    ):
        assert (await bob.complete(SHORT, model="tiny")).usage.completion_tokens == 4
        await asyncio.sleep(0.3)
        assert alice._link.epoch == 1  # the service would have taken its session back
    bobs = Transport(
        broker.by_password("bob"), subscriptions=[("tokenbus/v1/bob/out/#", 1)], identifier="known", session_expiry_s=60
    )
    async with bobs:
        pass
    async with connected(broker.by_password("bob")) as asking:
        await asking.publish(topics.request("bob", "tiny", "waits"), BODY)
        await asyncio.sleep(0.5)
    thief = Transport(broker.by_certificate("alice"), identifier="known", session_expiry_s=60)
    async with thief:
        assert await heard(thief) == []


async def test_the_services_identifier_is_drawn_once_and_kept_to_itself(tmp_path):
    first, again = (parts._identifier(tmp_path, "main") for _ in range(2))
    assert first == again
    assert len(first) == len("tokenbus-service-main-") + 32
    assert (tmp_path / "session").stat().st_mode & 0o777 == 0o600


async def test_the_service_has_no_more_rights_than_it_needs(running, broker):
    everywhere = ["#", "$SYS/#"]
    async with connected(broker.by_certificate("_service"), *everywhere) as the_service:
        for topic in (
            topics.request("bob", "tiny", "r1"),
            topics.cancel("bob", "r1"),
            "tokenbus/v1/_svc/main/other",
            "$SYS/broker/uptime",
        ):
            with pytest.raises(PublishRefused):
                await the_service.publish(topic, BODY)
        async with client(broker.by_password("bob"), "bob") as bob:
            await bob.complete(SHORT, model="tiny")
        seen = {message.topic for message in await heard(the_service)}
    assert any(topic.startswith("tokenbus/v1/bob/req/") for topic in seen)
    assert all(topic.startswith(("tokenbus/v1/bob/req/", "tokenbus/v1/_svc/", DROPPED)) for topic in seen)


async def test_only_the_monitoring_user_reads_the_brokers_figures_and_nothing_else(running, broker):
    async with connected(broker.by_password("_monitor"), "#", "$SYS/#") as monitor:
        async with client(broker.by_password("bob"), "bob") as bob:
            await bob.complete(SHORT, model="tiny")
        seen = {message.topic for message in await heard(monitor)}
    assert DROPPED in seen
    assert all(topic.startswith(("$SYS/", "tokenbus/v1/_svc/")) for topic in seen)
    async with connected(broker.by_certificate("_service"), DROPPED) as the_service:
        assert [message.topic for message in await heard(the_service)] == [DROPPED]


async def test_the_command_line_takes_certificates_and_passwords(running, broker):
    """It is answered: with what is wrong for the tiny model, or with why it can't come in."""
    alice, bob = broker.by_certificate("alice"), broker.by_password("bob")
    password = str(broker.keys / "bob.password")
    by_certificate = ("--broker", f"mqtts://{alice}", "--cert-file", alice.cert_file, "--key-file", alice.key_file)
    for arguments, says in (
        ((*by_certificate, "--tenant", "alice"), "messages: the model's chat template refuses them"),
        ((*by_certificate, "--tenant", "bob"), "the broker refused the message: Not authorized (135)"),
        (
            ("--broker", f"mqtts://{bob}", "--tenant", "bob", "--password-file", password),
            "messages: the model's chat template refuses them",
        ),
        (
            ("--broker", f"mqtts://{bob}", "--tenant", "bob", "--username", "alice", "--password-file", password),
            "the broker refused the connection: [code:135] Not authorized",
        ),
    ):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "scheduler.cli", "submit", "--model", "tiny", "--ca-file", broker.ca_file),
            *(*arguments, "Hello"),
            stderr=asyncio.subprocess.PIPE,
        )
        _, err = await process.communicate()
        assert process.returncode == 1
        assert err.decode().splitlines()[-1].startswith(f"Error: {says}")
