"""Trace contexts as they may come."""

import pytest

from protocol.client import Client
from protocol.request import Request
from protocol.trace import check_traceparent, find_traceparent
from protocol.transport import Transport
from tests.brokers import receive

GOOD = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
BAD = [
    "",
    GOOD.upper(),
    GOOD + "-x",
    GOOD + "\n",
    GOOD.replace("00-", "ff-", 1),
    "00-" + "0" * 32 + "-00f067aa0ba902b7-01",
    "00-4bf92f3577b34da6a3ce929d0e0e4736-" + "0" * 16 + "-01",
    "00-4bf92f3577b34da6a3ce929d0e0e473-00f067aa0ba902b7-01",
]


def test_a_good_one_is_found_among_other_properties():
    check_traceparent(GOOD)
    assert find_traceparent([("tracestate", "a=b"), ("traceparent", GOOD), ("x", "y")]) == GOOD


@pytest.mark.parametrize("text", BAD)
def test_a_bad_one_is_as_none(text):
    with pytest.raises(ValueError, match="traceparent must look like"):
        check_traceparent(text)
    assert find_traceparent([("traceparent", text)]) is None


def test_two_are_as_none():
    assert find_traceparent([("traceparent", GOOD), ("traceparent", GOOD)]) is None


async def test_it_crosses_the_broker_in_a_user_property(broker, address):
    async with Transport(address, subscriptions=[("there", 1)]) as transport:
        await transport.publish("there", b"x", traceparent=GOOD)
        assert (await receive(transport)).traceparent == GOOD
        await transport.publish("there", b"x")
        assert (await receive(transport)).traceparent is None


async def test_the_client_refuses_a_bad_one_at_once(broker):
    async with Client(broker.url, tenant="alice") as client:
        with pytest.raises(ValueError, match="traceparent"):
            client.stream(Request(prompt="x"), model="m", traceparent="x")
