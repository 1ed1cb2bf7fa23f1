"""Bodies: what is refused and how it is named, and that OpenAI's own models parse what we answer."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from protocol import openai, plan, replies
from protocol.chat import FunctionCall, ToolCall
from protocol.errors import BadRequest
from protocol.openai import Answer, PromptLogprob, TokenLogprob, TokenLogprobs, TopLogprob, Usage
from protocol.request import Message, Request, decode_request, encode_request


def test_an_openai_body_is_taken_as_it_is():
    request = decode_request(
        b'{"model": "smollm2", "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content":'
        b' [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]}], "max_completion_tokens": 5, "stop": "x",'
        b' "temperature": 0, "stream": true, "stream_options": {"include_usage": true}, "n": 1, "user": "u"}'
    )
    assert [message.text for message in request.messages] == ["Be brief.", "Hello"]
    assert (request.output_limit, request.stop_strings, request.stream) == (5, ("x",), True)
    assert decode_request(encode_request(request)) == request


def call(arguments: bytes) -> bytes:
    return b'{"id": "1", "function": {"name": "f", "arguments": "' + arguments + b'"}}'


ABBREVIATIONS = {
    b"[DEEP]": b"[" + call(b'{\\"a\\":' * 64 + b"1" + b"}" * 64) + b"]",
    b"[CALL]": b"[" + call(b"{}") + b"]",
    b"[BROKEN]": b"[" + call(b"{") + b"]",
    b"[LIST]": b"[" + call(b"[]") + b"]",
    b"DEEP": b'{"a":' * 64 + b"1" + b"}" * 64,
    b"TOOL": b'{"type": "function", "function": {"name": "f"}}',
    b"HUGE": b"0" * 20,
    b"BIG": b"x" * 32769,
}


@pytest.mark.parametrize(
    ("body", "field", "says"),
    [
        (b"not json", "body", "UTF-8 JSON"),
        (b"", "body", "UTF-8 JSON"),
        (b"\xff\xfe", "body", "UTF-8 JSON"),
        (b'{"prompt": "\xff\xfe"}', "body", "UTF-8 JSON"),
        (b"[]", "body", "object"),
        (b"null", "body", "object"),
        (b"{}", "messages", "exactly one"),
        (b'{"prompt": "a", "messages": [{"role": "user", "content": "a"}]}', "messages", "exactly one"),
        (b'{"prompt": ""}', "prompt", "empty"),
        (b'{"prompt": []}', "prompt", "empty"),
        (b'{"messages": []}', "messages", "length >= 1"),
        (b'{"prompt": ["a", "b"]}', "prompt[0]", "int"),
        (b'{"prompt": [-1]}', "prompt[0]", ">= 0"),
        (b'{"prompt": 5}', "prompt", "str"),
        (b'{"messages": [{"role": "wizard", "content": "a"}]}', "messages[0].role", "wizard"),
        (b'{"messages": [{"role": "user"}]}', "messages[0]", "content"),
        (b'{"prompt": "a", "max_tokens": 0}', "max_tokens", ">= 1"),
        (b'{"prompt": "a", "max_tokens": "5"}', "max_tokens", "int"),
        (b'{"prompt": "a", "max_tokens": 99999999999999999999}', "max_tokens", "<= 2147483647"),
        (b'{"prompt": "a", "max_tokens": 1, "max_completion_tokens": 1}', "max_completion_tokens", "either"),
        (b'{"prompt": "a", "temperature": NaN}', "body", "UTF-8 JSON"),
        (b'{"prompt": "a", "temperature": 1e999}', "temperature", "out of range"),
        (b'{"prompt": "a", "temperature": 2.5}', "temperature", "<= 2.0"),
        (b'{"prompt": "a", "temperature": -1}', "temperature", ">= 0.0"),
        (b'{"prompt": "a", "top_p": 0}', "top_p", "> 0.0"),
        (b'{"prompt": "a", "n": 0}', "n", ">= 1"),
        (b'{"prompt": "a", "n": 129}', "n", "<= 128"),
        (b'{"prompt": "a", "best_of": 0}', "best_of", ">= 1"),
        (b'{"prompt": "a", "n": 3, "best_of": 2}', "best_of", "at least n, 3"),
        (b'{"prompt": "a", "n": 2, "best_of": 3, "stream": true}', "best_of", "can't be streamed"),
        (b'{"prompt": "a", "stop": ""}', "stop", "length >= 1"),
        (b'{"prompt": "a", "stop": ["x", ""]}', "stop[1]", "length >= 1"),
        (b'{"prompt": "a", "priority": 101}', "priority", "<= 100"),
        (b'{"prompt": "a", "priority": -101}', "priority", ">= -100"),
        (b'{"prompt": "a", "deadline_ms": 0}', "deadline_ms", ">= 1"),
        (b'{"prompt": "a", "deadline_ms": 604800001}', "deadline_ms", "<= 604800000"),
        (b'{"prompt": "a", "refuse_late": 1}', "refuse_late", "bool"),
        (b'{"prompt": "a", "echo": true}', "body", "unknown field `echo`"),
        (b'{"prompt": "a", "typical_p": 0}', "typical_p", "> 0.0"),
        (b'{"prompt": "a", "typical_p": 1.1}', "typical_p", "<= 1.0"),
        (b'{"prompt": "a", "repetition_penalty": 0}', "repetition_penalty", ">= 0.01"),
        (b'{"prompt": "a", "repetition_penalty": 101}', "repetition_penalty", "<= 100"),
        (b'{"prompt": "a", "presence_penalty": -2.1}', "presence_penalty", ">= -2"),
        (b'{"prompt": "a", "frequency_penalty": 2.1}', "frequency_penalty", "<= 2"),
        (b'{"prompt": "a", "logit_bias": [5]}', "logit_bias", "object"),
        (b'{"prompt": "a", "logit_bias": {"x": 5}}', "logit_bias", "matching regex"),
        (b'{"prompt": "a", "logit_bias": {"-1": 5}}', "logit_bias", "matching regex"),
        (b'{"prompt": "a", "logit_bias": {"5": 101}}', "logit_bias[...]", "<= 100"),
        (b'{"prompt": "a", "bad_words": ["x", ""]}', "bad_words[1]", "length >= 1"),
        (b'{"prompt": "a", "min_tokens": -1}', "min_tokens", ">= 0"),
        (b'{"prompt": "a", "min_tokens": 9, "max_tokens": 8}', "min_tokens", "at most max_tokens, 8"),
        (b'{"prompt": "a", "logprobs": true}', "logprobs", "a number for a prompt"),
        (b'{"prompt": "a", "logprobs": 21}', "logprobs", "<= 20"),
        (b'{"prompt": "a", "logprobs": 2, "top_logprobs": 2}', "top_logprobs", "messages"),
        (b'{"messages": [{"role": "user", "content": "a"}], "logprobs": 2}', "logprobs", "a boolean for messages"),
        (b'{"messages": [{"role": "user", "content": "a"}], "top_logprobs": 2}', "top_logprobs", "logprobs = true"),
        (b'{"prompt": "a", "prompt_logprobs": 21}', "prompt_logprobs", "<= 20"),
        (b'{"prompt": ' + b"[" * 100_000, "prompt[0]", "int"),
        (b"[" * 100_000, "body", "object"),
        (b'{"metadata": {"a": ' + b'{"a":' * 100_000, "metadata[...]", "str"),
        (b'{"unknown": ' + b"[" * 100_000, "body", "unknown field"),
        *(
            (b'{"messages": [{"role": "user", "content": "a"}, ' + message + b"]}", f"messages[1]{field}", says)
            for message, field, says in (
                (b'{"role": "user", "content": "a", "tool_calls": [CALL]}', ".tool_calls", "only an assistant"),
                (b'{"role": "assistant", "tool_calls": []}', ".tool_calls", "length >= 1"),
                (b'{"role": "tool", "content": "a"}', ".tool_call_id", "required"),
                (b'{"role": "user", "content": "a", "tool_call_id": "1"}', ".tool_call_id", "no other role"),
                (b'{"role": "assistant", "tool_calls": [BROKEN]}', ".tool_calls[0].function.arguments", "JSON object"),
                (b'{"role": "assistant", "tool_calls": [DEEP]}', ".tool_calls[0].function.arguments", "64 deep"),
                (b'{"role": "assistant", "tool_calls": [LIST]}', ".tool_calls[0].function.arguments", "JSON object"),
            )
        ),
        *(
            (b'{"messages": [{"role": "user", "content": "a"}], ' + fields + b"}", field, says)
            for fields, field, says in (
                (b'"tools": []', "tools", "length >= 1"),
                (b'"tools": [TOOL, TOOL]', "tools[1].function.name", "another"),
                (b'"tools": [{"type": "function", "function": {"name": "a b"}}]', "tools[0].function.name", "matching"),
                (
                    b'"tools": [{"function": {"name": "f", "parameters": DEEP}}]',
                    "tools[0].function.parameters",
                    "64 deep",
                ),
                (
                    b'"tools": [{"function": {"name": "f", "parameters": {"a": 1HUGE}}}]',
                    "tools[0].function.parameters",
                    "64 bits",
                ),
                (b'"tool_choice": "required"', "tool_choice", "needs tools"),
                (b'"tools": [TOOL], "tool_choice": {"function": {"name": "g"}}', "tool_choice.function.name", "among"),
                (b'"continue_final_message": true', "add_generation_prompt", "must be false"),
                (b'"response_format": {"type": "xml"}', "response_format.type", "xml"),
                (b'"response_format": {"type": "json_schema"}', "response_format", "json_schema"),
                (b'"structured_outputs": {}', "structured_outputs", "exactly one"),
                (b'"structured_outputs": {"regex": "a", "choice": ["a"]}', "structured_outputs", "exactly one"),
                (b'"structured_outputs": {"regex": ""}', "structured_outputs.regex", "length >= 1"),
                (b'"structured_outputs": {"choice": []}', "structured_outputs.choice", "length >= 1"),
                (b'"structured_outputs": {"choice": ["BIG"]}', "structured_outputs.choice", "32768"),
                (b'"structured_outputs": {"json": {"title": "BIG"}}', "structured_outputs.json", "32768"),
                (b'"structured_outputs": {"json": DEEP}', "structured_outputs.json", "64 deep"),
                (b'"structured_outputs": {"json": {"maximum": 1HUGE}}', "structured_outputs.json", "64 bits"),
                (b'"structured_outputs": {"json": ' + b'{"a":' * 100_000, "body", "recursion"),
                (b'"structured_outputs": {"regex": "a"}, "ignore_eos": true', "ignore_eos", "ends where"),
                (b'"structured_outputs": {"regex": "a"}, "min_tokens": 2, "max_tokens": 9', "min_tokens", "ends where"),
                (b'"response_format": {"type": "json_object"}, "tools": [TOOL]', "response_format", "beside tools"),
                (
                    b'"response_format": {"type": "text"}, "structured_outputs": {"regex": "a"}',
                    "structured_outputs",
                    "either",
                ),
            )
        ),
        (b'{"prompt": "a", "tools": [TOOL]}', "tools", "needs messages"),
        (b'{"prompt": "a", "continue_final_message": true}', "continue_final_message", "needs messages"),
    ],
)
def test_bad_bodies_name_the_field_and_the_limit(body, field, says):
    for name, text in ABBREVIATIONS.items():
        body = body.replace(name, text)
    with pytest.raises(BadRequest) as caught:
        decode_request(body)
    assert caught.value.body.param == field
    assert says in caught.value.body.message
    assert caught.value.body.code == "invalid_request"


@given(st.binary(max_size=200))
def test_no_bytes_do_anything_but_decode_or_be_refused(body):
    try:
        assert isinstance(decode_request(body), Request)
    except BadRequest as error:
        assert error.body.param


def test_a_chat_with_tools_is_taken_as_it_is():
    request = decode_request(
        b'{"messages": [{"role": "user", "content": "Weather?"}, {"role": "assistant", "content": null, "tool_calls":'
        b' [{"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{\\"city\\": \\"Paris\\"}"}}]},'
        b' {"role": "tool", "tool_call_id": "c1", "content": "Rain"}], "tools": [{"type": "function", "function":'
        b' {"name": "weather", "description": "d", "parameters": {"type": "object"}, "strict": true}}],'
        b' "tool_choice": {"type": "function", "function": {"name": "weather"}}, "parallel_tool_calls": false}'
    )
    assert request.messages[1].tool_calls[0].function.decoded() == {"city": "Paris"}
    assert (request.must_call, request.is_constrained) == (True, True)
    assert decode_request(encode_request(request)) == request
    assert not msgspec.structs.replace(request, tool_choice="none").offered_tools


USAGE = Usage(3, 5, 8)
CALLS = [ToolCall("c12345678", FunctionCall("weather", "{}"))]


def test_openai_models_parse_every_kind_of_answer():
    common = {"request_id": "r1", "created": 1700000000, "model": "smollm2"}
    chat = openai.answer(chat=True, answers=[Answer("hi", "stop")], usage=USAGE, **common)
    text = openai.answer(chat=False, answers=[Answer("hi", "length")], usage=USAGE, **common)
    common_piece = {**common, "text": "hi"}
    chat_piece = openai.piece(chat=True, reason=None, first=True, **common_piece)
    last_piece = openai.piece(chat=True, reason="stop", first=False, **common_piece)
    calling = openai.answer(chat=True, answers=[Answer("", "tool_calls", CALLS)], usage=USAGE, **common)
    calling_piece = openai.piece(chat=True, reason=None, first=False, **common_piece, calls=CALLS, calls_before=1)
    text_piece = openai.piece(chat=False, reason=None, first=True, **common_piece)
    for model, body in (
        (ChatCompletion, chat),
        (Completion, text),
        (ChatCompletionChunk, chat_piece),
        (ChatCompletionChunk, last_piece),
        (ChatCompletion, calling),
        (ChatCompletionChunk, calling_piece),
    ):
        parsed = model.model_validate_json(msgspec.json.encode(body), strict=True)
        assert parsed.id.endswith("r1")
    # OpenAI streams completions with a null finish_reason, which its package therefore constructs without validating.
    assert Completion.construct(**msgspec.json.decode(msgspec.json.encode(text_piece))).choices[0].text == "hi"
    assert ChatCompletion.model_validate_json(msgspec.json.encode(chat)).choices[0].message.content == "hi"
    assert ChatCompletion.model_validate_json(msgspec.json.encode(chat)).usage.total_tokens == 8
    assert ChatCompletionChunk.model_validate_json(msgspec.json.encode(chat_piece)).choices[0].delta.role == "assistant"
    choice = ChatCompletion.model_validate_json(msgspec.json.encode(calling)).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    assert choice.message.tool_calls[0].function.name == "weather"
    delta = ChatCompletionChunk.model_validate_json(msgspec.json.encode(calling_piece)).choices[0].delta
    assert (delta.tool_calls[0].index, delta.tool_calls[0].id) == (1, "c12345678")


LOGPROBS = TokenLogprobs(
    [
        TokenLogprob("h", -0.5, [104], [TopLogprob("h", -0.5, [104]), TopLogprob("H", -1.5, [72])]),
        TokenLogprob("i", -3.0, [105], [TopLogprob("\\x9f", -0.1, [0x9F]), TopLogprob("\\x9f", -0.2, [0x9E])]),
    ],
    [0, 1],
)
PROMPT_LOGPROBS = [None, {5: PromptLogprob(-0.25, 1, "a")}]


def test_openai_models_parse_log_probabilities():
    common = {"request_id": "r1", "created": 1700000000, "model": "smollm2"}
    answers = [Answer("hi", "stop", logprobs=LOGPROBS)]
    whole = {"answers": answers, "usage": USAGE, "prompt_logprobs": PROMPT_LOGPROBS}
    bodies = {
        ChatCompletion: openai.answer(chat=True, **whole, **common),
        ChatCompletionChunk: openai.piece(chat=True, reason=None, first=True, text="hi", logprobs=LOGPROBS, **common),
        Completion: openai.answer(chat=False, **whole, **common),
    }
    parsed = {
        model: model.model_validate_json(msgspec.json.encode(body), strict=True) for model, body in bodies.items()
    }
    for model in (ChatCompletion, ChatCompletionChunk):
        first, second = parsed[model].choices[0].logprobs.content
        assert (first.token, first.logprob, first.bytes) == ("h", -0.5, [104])
        assert [(top.token, top.bytes) for top in second.top_logprobs] == [("\\x9f", [0x9F]), ("\\x9f", [0x9E])]
    assert parsed[ChatCompletion].prompt_logprobs[1]["5"]["decoded_token"] == "a"  # an extra field, as vLLM has it
    choice = parsed[Completion].choices[0]
    assert choice.prompt_logprobs == [None, {"5": {"logprob": -0.25, "rank": 1, "decoded_token": "a"}}]
    assert (choice.logprobs.tokens, choice.logprobs.text_offset) == (["h", "i"], [0, 1])
    assert choice.logprobs.token_logprobs == [-0.5, -3.0]
    assert choice.logprobs.top_logprobs == [{"h": -0.5, "H": -1.5}, {"i": -3.0, "\\x9f": -0.1}]


@pytest.mark.parametrize("chat", [True, False])
def test_openai_models_parse_several_choices(chat):
    common = {"chat": chat, "request_id": "r1", "created": 1700000000, "model": "smollm2"}
    answers = [Answer("one", "stop"), Answer("two", "length")]
    body = msgspec.json.encode(openai.answer(answers=answers, usage=USAGE, **common))
    whole = (ChatCompletion if chat else Completion).model_validate_json(body, strict=True)
    assert [(choice.index, choice.finish_reason) for choice in whole.choices] == [(0, "stop"), (1, "length")]
    piece = msgspec.json.encode(openai.piece(text="two", reason="length", first=True, index=1, **common))
    part = (ChatCompletionChunk if chat else Completion).model_validate_json(piece, strict=True)
    assert [(choice.index, choice.finish_reason) for choice in part.choices] == [(1, "length")]


def test_without_log_probabilities_nothing_is_said_of_the_prompt():
    answers = [Answer("", "stop")]
    body = openai.answer(chat=True, request_id="r", created=1, model="m", answers=answers, usage=USAGE)
    assert b"prompt_logprobs" not in msgspec.json.encode(body)


@pytest.mark.parametrize(
    ("fields", "number"),
    [
        ({"prompt": "a"}, None),
        ({"prompt": "a", "logprobs": 0}, 0),
        ({"prompt": "a", "logprobs": 5}, 5),
        ({"messages": [Message("user", "a")], "logprobs": False}, None),
        ({"messages": [Message("user", "a")], "logprobs": True}, 0),
        ({"messages": [Message("user", "a")], "logprobs": True, "top_logprobs": 5}, 5),
    ],
)
def test_log_probabilities_are_asked_for_in_two_ways(fields, number):
    assert decode_request(encode_request(Request(**fields))).num_logprobs == number


def test_replies_round_trip():
    answers = [Answer("hi", "stop"), Answer("ho", "length")]
    data = openai.answer(chat=True, request_id="r", created=1, model="m", answers=answers, usage=USAGE)
    piece = openai.piece(chat=False, request_id="r", created=1, model="m", text="h", reason=None, first=True)
    for reply in (
        replies.Accepted("r"),
        replies.Chunk("r", 0, piece),
        replies.Result("r", data, replies.Timings(0.1, None, 0.2), 3),
        replies.Cancelled("r", 7),
        replies.Expired("r", 7, 2),
        replies.Failed(None, BadRequest("prompt", "must not be empty").body),
    ):
        assert replies.decode_reply(replies.encode(reply)) == reply


def test_frames_round_trip():
    step = plan.StepPlan(
        3, [plan.Admission(0, [5, 6], plan.Sampling(0.5, seed=9), 2)], [1], [plan.Row(0, 0, 2, [1], sample=True)]
    )
    frame = plan.frame(step)
    body = frame[plan.HEADER_BYTES :]
    assert plan.body_length(frame[: plan.HEADER_BYTES]) == len(body)
    assert plan.decode_command(body) == step
    failure = plan.StepFailure(3, "boom")
    assert plan.decode_reply(plan.frame(failure)[plan.HEADER_BYTES :]) == failure


def test_message_text():
    assert Message("user", "plain").text == "plain"
