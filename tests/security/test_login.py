"""Who gets in at the shipped broker."""

import asyncio

import pytest

from protocol.client import Client
from protocol.transport import NO_SUBSCRIBER, BrokerAddress, BrokerUnreachable, ConnectionRefused, PublishRefused
from tests.security.conftest import connected, run

pytestmark = pytest.mark.timeout(60)


async def test_a_password_logs_in(broker):
    async with connected(broker.by_password("bob")) as bob:
        assert await bob.publish("tokenbus/v1/bob/req/m/1", b"x") == NO_SUBSCRIBER


@pytest.mark.parametrize(
    ("user", "password"), [("bob", "wrong"), ("nobody", "any"), ("alice", ""), (None, None)], ids=str
)
async def test_anyone_else_is_refused(broker, user, password):
    with pytest.raises(ConnectionRefused, match="Not authorized"):
        async with connected(broker.by_password(user, password)):
            pass


async def test_a_certificate_logs_in_and_its_name_is_the_tenant(broker):
    """Whatever user the client claims to be."""
    async with connected(broker.by_certificate("alice", username="bob")) as alice:
        assert await alice.publish("tokenbus/v1/alice/req/m/1", b"x") == NO_SUBSCRIBER
        with pytest.raises(PublishRefused):
            await alice.publish("tokenbus/v1/bob/req/m/1", b"x")


async def test_a_certificate_of_another_authority_is_refused(broker):
    other = [
        "-keyout",
        f"{broker.keys}/other.key",
        "-out",
        f"{broker.keys}/other.crt",
        "-subj",
        "/CN=tokenbus authority",
    ]
    run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", *other])
    broker.certify("alice", authority="other")
    with pytest.raises(BrokerUnreachable, match="another certificate"):
        async with connected(broker.by_certificate("forged")):
            pass


async def test_a_tenant_cannot_sign_certificates(broker):
    broker.certify("bob", authority="alice")
    with pytest.raises(BrokerUnreachable, match="another certificate"):
        async with connected(broker.by_certificate("forged")):
            pass


async def test_no_certificate_is_no_way_in(broker):
    address = BrokerAddress.parse(
        f"mqtts://127.0.0.1:{broker.certificate_port}", username="bob", password="x", ca_file=broker.ca_file
    )
    with pytest.raises(BrokerUnreachable):
        async with connected(address):
            pass


async def test_no_plaintext(broker):
    for port in (broker.password_port, broker.certificate_port):
        with pytest.raises(BrokerUnreachable):
            async with connected(BrokerAddress("127.0.0.1", port, "bob", broker.by_password("bob").password)):
                pass


async def test_a_client_that_does_not_know_the_authority_stays_away(broker):
    """So nobody between can pretend to be the broker."""
    with pytest.raises(BrokerUnreachable, match="CERTIFICATE_VERIFY_FAILED"):
        async with connected(BrokerAddress.parse(f"mqtts://bob@127.0.0.1:{broker.password_port}")):
            pass


async def test_the_client_takes_the_same_files(broker):
    address = broker.by_certificate("alice")
    client = Client(
        f"mqtts://127.0.0.1:{address.port}",
        tenant="alice",
        ca_file=address.ca_file,
        cert_file=address.cert_file,
        key_file=address.key_file,
    )
    async with asyncio.timeout(10), client:
        await client.cancel("nothing")
