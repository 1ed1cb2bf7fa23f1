import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import topics
from protocol.topics import TopicError

names = st.from_regex(r"[A-Za-z0-9.-][A-Za-z0-9_.-]{0,63}", fullmatch=True)


@given(tenant=names, model=names, id=names, kind=st.sampled_from(topics.KINDS))
def test_topics_round_trip(tenant, model, id, kind):
    topic = topics.request(tenant, model, id, kind)
    assert topics.parse_request(topic) == topics.RequestTopic(tenant, model, id, kind)
    assert topics.kind_of(topic) == kind
    assert topics.kind_of(topics.cancel(tenant, id)) is None
    assert topics.parse_cancel(topics.cancel(tenant, id)) == topics.CancelTopic(tenant, id)
    assert topics.tenant_of(topic) == tenant


@given(bad=st.text().filter(lambda text: not topics.is_name(text)))
def test_nothing_else_is_a_name(bad):
    for make in (
        lambda: topics.request("t", "m", bad),
        lambda: topics.request(bad, "m", "i"),
        lambda: topics.cancel("t", bad),
    ):
        with pytest.raises(TopicError, match="1 to 64 characters"):
            make()


@pytest.mark.parametrize("name", ["", "a/b", "a+b", "a#", "$SYS", "ü", "a b", "x" * 65, "_svc", "a\0"])
def test_names_that_would_break_the_grammar(name):
    assert not topics.is_name(name)


@pytest.mark.parametrize(
    ("response_topic", "problem"),
    [
        ("tokenbus/v1/bob/out/x", "must lie under tokenbus/v1/alice/out/"),
        ("tokenbus/v1/alice/out/", "must lie under"),
        ("tokenbus/v1/alice/out/+", "wildcards"),
        ("tokenbus/v1/alice/out/#", "wildcards"),
        ("tokenbus/v1/alice/out/" + "x" * 512, "at most 512 bytes"),
        ("tokenbus/v1/alice/out/\0", "can't be printed"),
        ("tokenbus/v1/alice/out/\x85", "can't be printed"),
        ("tokenbus/v1/alice/out/" + "/" * 200, "at most 32 levels"),
        ("$SYS/x", "must lie under"),
    ],
)
def test_response_topics_outside_the_own_tree_are_refused(response_topic, problem):
    with pytest.raises(TopicError, match=problem):
        topics.own_response_topic("alice", response_topic)


@given(
    tenant=names,
    other=names,
    topic=st.lists(
        st.sampled_from(["tokenbus", "v1", "/", "out", "req", "..", "+", "#", "$SYS", "\0", "é", "alice", "bob"])
    ).map("".join)
    | st.text(),
    inside=st.booleans(),
)
def test_only_publishable_topics_in_the_own_tree_are_ever_accepted(tenant, other, topic, inside):
    """Whatever a Response Topic is made of, and whoever asks."""
    topic = f"tokenbus/v1/{tenant}/out/{topic}" if inside else topic
    try:
        accepted = topics.own_response_topic(tenant, topic)
    except TopicError:
        return
    assert accepted.split("/")[:4] == ["tokenbus", "v1", tenant, "out"]
    assert not set(accepted) & set("+#\0")
    assert len(accepted.split("/")) <= 32
    if other != tenant:
        with pytest.raises(TopicError):
            topics.own_response_topic(other, accepted)


def test_own_response_topic():
    assert topics.own_response_topic("alice", "tokenbus/v1/alice/out/c1/r1") == "tokenbus/v1/alice/out/c1/r1"


@pytest.mark.parametrize("topic", ["tokenbus/v1/t/req/m", "tokenbus/v1/t/req/m/i/more"])
def test_request_topics_have_six_levels(topic):
    with pytest.raises(TopicError, match="<tenant>/req/<model>/<request_id>"):
        topics.parse_request(topic)
