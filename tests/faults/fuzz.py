"""Messages that nobody should send, each with what must be answered to it; the same ones for the same seed."""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from protocol import topics

TENANT = "mallory"
MODEL = "tiny"
VALID = {"prompt": [5, 6, 7], "max_tokens": 4, "temperature": 0.0}
#: What would do for the kinds that generate nothing.
VALID_OTHERS = {"embed": {"input": [5, 6, 7]}, "score": {"text": [5, 6, 7], "context": [8]}}

_DEEP = [[]]
for _ in range(50):
    _DEEP = [_DEEP]
_HUGE = 10**30
_WRONG_ANYWHERE = (_DEEP, {"a": {"b": 1}}, [None])
_WRONG_NUMBERS = ("1", True, [], {}, _HUGE, -_HUGE)

#: Values outside of what each field may be.
WRONG: dict[str, tuple[Any, ...]] = {
    "messages": (
        *_WRONG_ANYWHERE,
        1,
        "hello",
        [],
        [1],
        [{}],
        [{"role": "user"}],
        [{"role": "nobody", "content": "x"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": []}],
        [{"role": "user", "content": [{"type": "image", "text": "x"}]}],
        [{"role": "user", "content": "x", "extra": 1}],
        [{"role": "user", "content": "x", "name": "x" * 65}],
        [{"role": "user", "content": "x"}] * 1025,
    ),
    "prompt": (*_WRONG_ANYWHERE, None, 1, True, "", [], ["a"], [1.5], [-1], [97], [2**31], [_HUGE], [5] * 4096),
    "model": (*_WRONG_ANYWHERE, 1, "", "other"),
    "max_tokens": (*_WRONG_ANYWHERE, *_WRONG_NUMBERS, 0, -1, 1.5, 4096, 2**31, 2**63),
    "max_completion_tokens": (*_WRONG_ANYWHERE, *_WRONG_NUMBERS, 0, -1, 1.5, 4),
    "temperature": (*_WRONG_ANYWHERE, *_WRONG_NUMBERS, -0.1, 2.1),
    "top_p": (*_WRONG_ANYWHERE, *_WRONG_NUMBERS, 0, -1, 1.1),
    "top_k": (*_WRONG_ANYWHERE, *_WRONG_NUMBERS, -2, 1.5, 2**31),
    "min_p": (*_WRONG_ANYWHERE, *_WRONG_NUMBERS, -0.1, 1.1),
    "seed": (*_WRONG_ANYWHERE, *_WRONG_NUMBERS, 2**63, -(2**63) - 1, 1.5),
    "stop": (*_WRONG_ANYWHERE, 1, "", [""], [1], "x" * 257, ["x"] * 17),
    "stop_token_ids": (*_WRONG_ANYWHERE, 1, "x", ["a"], [-1], [2**31], [1] * 129),
    "ignore_eos": (*_WRONG_ANYWHERE, 1, "true", None),
    "stream": (*_WRONG_ANYWHERE, 0, "false", None),
    "stream_options": (*_WRONG_ANYWHERE, 1, {"include_usage": 1}, {"x": 1}),
    "n": (*_WRONG_ANYWHERE, *_WRONG_NUMBERS, 0, 17, 129, 1.5, None),
    "best_of": (*_WRONG_ANYWHERE, *_WRONG_NUMBERS, 0, 17, 129, 1.5),
    "user": (*_WRONG_ANYWHERE, 1, "x" * 257),
    "priority": (*_WRONG_ANYWHERE, *_WRONG_NUMBERS, -101, 101, 1.5, None),
    "deadline_ms": (*_WRONG_ANYWHERE, *_WRONG_NUMBERS, 0, -1, 1.5, 604_800_001, 2**63),
    "refuse_late": (*_WRONG_ANYWHERE, True, 1, "true", None),  # there is no deadline
    "metadata": (*_WRONG_ANYWHERE, 1, "x", [], {"a": 1}, {"a": None}),
    "min_tokens": (*_WRONG_ANYWHERE, *_WRONG_NUMBERS, -1, 5, 1.5, None),
    "typical_p": (*_WRONG_ANYWHERE, *_WRONG_NUMBERS, 0, -1, 1.1),
    "repetition_penalty": (*_WRONG_ANYWHERE, *_WRONG_NUMBERS, 0, -1, 101),
    "presence_penalty": (*_WRONG_ANYWHERE, *_WRONG_NUMBERS, -2.1, 2.1, None),
    "frequency_penalty": (*_WRONG_ANYWHERE, *_WRONG_NUMBERS, -2.1, 2.1, None),
    "logit_bias": (*_WRONG_ANYWHERE, 1, "x", [], {"x": 1}, {"5": 101}, {"5": "1"}, {"97": 1}, {str(_HUGE): 1}),
    "bad_words": (*_WRONG_ANYWHERE, 1, "x", [""], [1], ["x" * 257], ["x"] * 129),
    "include_stop_str_in_output": (*_WRONG_ANYWHERE, 1, "true", None),
    "logprobs": (*_WRONG_ANYWHERE, "1", [], {}, -1, 21, 1.5, _HUGE),
    "top_logprobs": (*_WRONG_ANYWHERE, *_WRONG_NUMBERS, -1, 21, 1.5, 1),  # without logprobs
    "prompt_logprobs": (*_WRONG_ANYWHERE, *_WRONG_NUMBERS, -1, 21, 1.5),
    "add_generation_prompt": (*_WRONG_ANYWHERE, 1, "true", None),
    "continue_final_message": (*_WRONG_ANYWHERE, 1, "true", None, True),  # there are no messages
    "parallel_tool_calls": (*_WRONG_ANYWHERE, 1, "true", None),
    "tools": (*_WRONG_ANYWHERE, 1, "x", [], [1], [{}], [{"type": "function", "function": {"name": "a b"}}]),
    "tool_choice": (*_WRONG_ANYWHERE, 1, "any", [], {}, "required"),  # of no tools
    "response_format": (
        *_WRONG_ANYWHERE,
        1,
        "json_object",
        {"type": "yaml"},
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}},
    ),
    "structured_outputs": (
        *_WRONG_ANYWHERE,
        1,
        "x",
        {},
        {"regex": "("},
        {"regex": "a", "choice": ["a"]},
        {"choice": []},
        {"grammar": "start: nothing"},
        {"json": {"type": "nothing"}},
    ),
}
#: The same for those kinds.
WRONG_OTHERS: dict[str, dict[str, tuple[Any, ...]]] = {
    "embed": {
        "input": (
            *_WRONG_ANYWHERE,
            None,
            1,
            "",
            [],
            [""],
            [[]],
            [5, "a"],
            ["a", [5]],
            [[5], 5],
            [1.5],
            [-1],
            [97],
            [[5], [97]],
            [2**31],
            [_HUGE],
            ["a"] * 2049,
            [5] * 4097,
            [[5], [5] * 4097],
        ),
        "pooling": (*_WRONG_ANYWHERE, 1, "max", None),
        "normalize": (*_WRONG_ANYWHERE, 1, "true", None),
        "encoding_format": (*_WRONG_ANYWHERE, 1, "hex", None),
        "dimensions": (*_WRONG_ANYWHERE, *_WRONG_NUMBERS, 0, 1, 31, 33, 1.5),
    },
    "score": {
        "text": (*_WRONG_ANYWHERE, None, 1, "", [], ["a"], [1.5], [-1], [97], [2**31], [_HUGE], "text", [5] * 4097),
        "context": (*_WRONG_ANYWHERE, 1, "a", ["a"], [-1], [97], [_HUGE], [5] * 4096),
        "logprobs": (*_WRONG_ANYWHERE, *_WRONG_NUMBERS, -1, 21, 1.5, None),
        "temperature": (0.0,),
    },
}
for _fields in WRONG_OTHERS.values():
    _fields |= {name: WRONG[name] for name in ("model", "user", "priority", "deadline_ms", "refuse_late")}
_NUMBERS = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "n", "priority", "deadline_ms")
_NO_NUMBERS = (
    b"NaN",
    b"-NaN",
    b"Infinity",
    b"-Infinity",
    b"1e400",
    b"-1e400",
    b"0x1",
    b"+1",
    b"01",
    b"1.",
    b"9" * 6000,
)
_NO_UTF8 = (b"\xff", b"\x80", b"\xc3", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xc0\xaf", b"\\ud800", b"\\udfff", b"\0")
_NO_IDS = (
    "",
    " ",
    "_",
    "_x",
    "x" * 65,
    "x" * 60_000,
    "é",
    "☃",
    "\ufeff",
    "\u2028",
    "\ue000",
    "$SYS",
    "a b",
    "a%",
    "\\",
    '"',
)
_NOT_OWN = (
    "",
    "/",
    "$SYS/broker/uptime",
    "tokenbus/v1/neighbour/out/r1",
    f"tokenbus/v1/{TENANT}/outer/x",
    f"tokenbus/v1/{TENANT}/req/tiny/x",
    topics.out(TENANT, ""),
    topics.out(TENANT, "+"),
    topics.out(TENANT, "x/#"),
    topics.out(TENANT, "\ufeff"),
    topics.out(TENANT, "\u2028"),
    topics.out(TENANT, "\ue000"),
    topics.out(TENANT, "/" * 150),
    topics.out(TENANT, "/" * 60_000),
    topics.out(TENANT, "x" * 512),
)
_OWN = (topics.out(TENANT, "in box"), topics.out(TENANT, "é/☃"), topics.out(TENANT, "a/b/c"), topics.out(TENANT, "/"))
_NO_TENANTS = ("", " ", "_x", "é", "\ufeff", "x" * 65, "$SYS", "mal lory")


@dataclass(frozen=True)
class Message:
    """What is sent, and where the answer must come, with which id in it. ``correlation`` is unlike any other's."""

    topic: str
    payload: bytes
    correlation: bytes
    response_topic: str | None
    answer_topic: str
    answer_id: str | None

    @property
    def answer_correlation(self) -> bytes | None:
        """None: it was too long to be kept."""
        return self.correlation if len(self.correlation) <= 1024 else None


def messages(count: int, seed: int) -> Iterator[Message]:
    draw = random.Random(seed)
    for number in range(count):
        yield draw.choices((_body, _other_body, _address, _cancel), (8, 2, 2, 1))[0](draw, f"f{number}")


def _body(draw: random.Random, id: str) -> Message:
    """A usable address, where what is sent is not."""
    own = draw.choice((None, None, *_OWN))
    payload = draw.choice(_PAYLOADS)(draw)
    return Message(topics.request(TENANT, MODEL, id), payload, id.encode(), own, own or topics.out(TENANT, id), id)


def _other_body(draw: random.Random, id: str) -> Message:
    """The same of the kinds that generate nothing."""
    kind = draw.choice(("embed", "score"))
    own = draw.choice((None, None, *_OWN))
    fields = WRONG_OTHERS[kind]
    field = draw.choice(tuple(fields))
    body = VALID_OTHERS[kind] | {field: draw.choice(fields[field])}
    payload = draw.choice((json.dumps(body).encode(), json.dumps(body).encode(), _valid(), _noise(draw)))
    return Message(
        topics.request(TENANT, MODEL, id, kind), payload, id.encode(), own, own or topics.out(TENANT, id), id
    )


def _address(draw: random.Random, id: str) -> Message:
    """What is sent would do, but for its way here or back."""
    usable = Message(topics.request(TENANT, MODEL, id), _valid(), id.encode(), None, topics.out(TENANT, id), id)
    match draw.randrange(5):
        case 0:
            correlation = id.encode().ljust(draw.choice((1025, 5000, 65_535)), b"\0")
            own = draw.choice((None, *_OWN))
            answer_topic = own or usable.answer_topic
            return replace(usable, correlation=correlation, response_topic=own, answer_topic=answer_topic)
        case 1:
            return replace(usable, response_topic=draw.choice(_NOT_OWN))
        case 2:
            model = draw.choice(("other", "Tiny", *_NO_IDS))
            return replace(usable, topic=f"tokenbus/v1/{TENANT}/{draw.choice(topics.KINDS)}/{model}/{id}")
        case 3:
            tenant = draw.choice(_NO_TENANTS)
            topic = f"tokenbus/v1/{tenant}/req/{MODEL}/{id}"
            return replace(usable, topic=topic, answer_topic=topics.out(tenant, id))
        case _:
            rest = draw.choice([f"/{MODEL}/{bad}" for bad in _NO_IDS] + ["", "/", "//", f"/{MODEL}/x/", "/" * 190])
            own = draw.choice((None, *_OWN))
            return replace(
                usable,
                topic=f"tokenbus/v1/{TENANT}/{draw.choice(topics.KINDS)}{rest}",
                response_topic=own,
                answer_topic=own or topics.out(TENANT, topics.UNADDRESSED),
                answer_id=None,
            )


def _cancel(draw: random.Random, id: str) -> Message:
    """With a body, without a usable id, or of nothing that runs."""
    own = draw.choice((None, *_OWN))
    catch_all = topics.out(TENANT, topics.UNADDRESSED)
    usable = Message(topics.cancel(TENANT, id), b"", id.encode(), own, own or catch_all, id)
    match draw.randrange(3):
        case 0:
            return replace(usable, payload=draw.choice((b"\0", b"{}", _valid(), draw.randbytes(1000))))
        case 1:
            rest = draw.choice([f"/{bad}" for bad in _NO_IDS] + ["", "/x/", "//"])
            return replace(usable, topic=f"tokenbus/v1/{TENANT}/cancel{rest}", answer_id=None)
        case _:
            asked = draw.choice(_OWN)
            return replace(usable, response_topic=asked, answer_topic=asked)


def _valid(**more: Any) -> bytes:
    return json.dumps(VALID | more).encode()


def _noise(draw: random.Random) -> bytes:
    return draw.randbytes(draw.randrange(300))


def _mutilated(draw: random.Random) -> bytes:
    whole = _valid()
    return draw.choice((whole[: draw.randrange(len(whole))], whole + whole, whole + b"x", b"\xef\xbb\xbf" + whole))


def _no_utf8(draw: random.Random) -> bytes:
    return b'{"prompt": "once %s upon"}' % draw.choice(_NO_UTF8)


def _deep(draw: random.Random) -> bytes:
    field, depth = draw.choice((*WRONG, "x")), draw.choice((10, 1000, 50_000))
    opening, closing = draw.choice(((b"[", b"]"), (b'{"a":', b"}")))
    return b'{"%s": %s%s}' % (field.encode(), opening * depth, draw.choice((b"", b"1" + closing * depth)))


def _no_number(draw: random.Random) -> bytes:
    return b'{"prompt": [5], "%s": %s}' % (draw.choice(_NUMBERS).encode(), draw.choice(_NO_NUMBERS))


def _wrong_value(draw: random.Random) -> bytes:
    field = draw.choice(tuple(WRONG))
    body: dict[str, Any] = {} if field == "messages" else dict(VALID)
    return json.dumps(body | {field: draw.choice(WRONG[field])}).encode()


def _twice(draw: random.Random) -> bytes:
    """One key twice, of which one is wrong."""
    values = [b"4", draw.choice((b"0", b"null0", b'"4"', b"[]", b"NaN"))]
    draw.shuffle(values)
    return b'{"prompt": [5], "max_tokens": %s, "max_tokens": %s}' % tuple(values)


def _unknown_field(draw: random.Random) -> bytes:
    name = "".join(draw.choices("abcxyz_é☃\u2028\0\"'{", k=draw.randint(0, 20)))
    return _valid(**{f"x{name}": draw.choice((1, None, "x", _DEEP, _HUGE, name * 100))})


def _long(draw: random.Random) -> bytes:
    """Over the context, and in one of a hundred over the limit for bodies."""
    text = "word " * (300_000 if draw.randrange(100) == 0 else 6000)
    chat = {"messages": [{"role": "user", "content": text}]}
    return json.dumps(draw.choice(({"prompt": text}, chat, {"prompt": "a", "user": text}))).encode()


_PAYLOADS: tuple[Callable[[random.Random], bytes], ...] = (
    _noise,
    _mutilated,
    _no_utf8,
    _deep,
    _no_number,
    _wrong_value,
    _wrong_value,
    _wrong_value,
    _twice,
    _unknown_field,
    _long,
)
