"""Tool calls in text, as each family of models writes them: found whole, streamed without taking anything back."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.tools import FORCED, FORMATS, Format, Said, ToolParser, recognise

NAMES = ["weather", "time"]
PARIS = '{"name": "weather", "arguments": {"city": "Paris"}}'
NOON = '{"name": "time", "arguments": {}}'


def parser(format: Format, most: int | None = None) -> ToolParser:
    return ToolParser(format, NAMES, "alice/a", most)


def said(format: Format, text: str) -> tuple[str, list[tuple[str, object]]]:
    whole = parser(format).parse(text, complete=True)
    return whole.content, [(call.function.name, json.loads(call.function.arguments)) for call in whole.calls]


CALLED = [("weather", {"city": "Paris"})]


@pytest.mark.parametrize(
    ("format", "text", "content", "calls"),
    [
        ("hermes", f"<tool_call>\n{PARIS}\n</tool_call>", "", CALLED),
        (
            "hermes",
            f"Let me see.\n<tool_call>{PARIS}</tool_call>\n<tool_call>\n{NOON}\n</tool_call>\n",
            "Let me see.",
            [*CALLED, ("time", {})],
        ),
        ("hermes", f"<tool_call>{PARIS}</tool_call> there", "there", CALLED),
        ("llama3_json", '{"name": "weather", "parameters": {"city": "Paris"}}', "", CALLED),
        ("mistral", f"[TOOL_CALLS] [{PARIS}, {NOON}]", "", [*CALLED, ("time", {})]),
        ("mistral", f"Well: [TOOL_CALLS][{PARIS}]", "Well:", CALLED),
    ],
)
def test_calls_are_found(format, text, content, calls):
    assert said(FORMATS[format], text) == (content, calls)


@pytest.mark.parametrize(
    "text",
    [
        " Just text.\n",
        "<tool_call>",
        f"<tool_call>{PARIS}",
        "<tool_call>{not json}</tool_call>",
        '<tool_call>{"name": "rm", "arguments": {}}</tool_call>',
        '<tool_call>{"name": ["weather"], "arguments": {}}</tool_call>',
        '<tool_call>{"name": "weather", "arguments": "Paris"}</tool_call>',
        '<tool_call>{"name": "weather", "arguments": {"degrees": NaN}}</tool_call>',
        '<tool_call>{"name": "weather", "arguments": {"degrees": 1e999}}</tool_call>',
        "<tool_call>[]</tool_call>",
        "<tool_call>5</tool_call>",
        "<tool_call>" + "[" * 100_000,
        '<tool_call>{"name": "weather", "arguments": {"n": ' + "9" * 5000 + "}}</tool_call>",
        'The answer is {"name": "weather", "parameters": {}}',
        '{"name": "rm", "parameters": {}}',
        '[{"name": "rm"}]',
    ],
)
@pytest.mark.parametrize("format", FORMATS)
def test_what_is_no_call_of_a_tool_that_was_offered_stays_as_it_was_written(format, text):
    assert said(FORMATS[format], text) == (text, [])


def test_a_broken_call_hides_none_after_it():
    text = f"<tool_call>{{</tool_call> <tool_call>{PARIS}</tool_call>"
    assert said(FORMATS["hermes"], text) == ("<tool_call>{</tool_call>", CALLED)


def test_arguments_of_any_text_are_json_that_can_be_sent():
    (call,) = parser(FORCED).parse('[{"name": "time", "arguments": {"zone": "\\ud800é"}}]', complete=True).calls
    assert json.loads(call.function.arguments.encode().decode()) == {"zone": "\ud800é"}


def test_a_calls_id_is_the_same_in_every_process_and_another_for_every_call():
    text = f"[{PARIS}, {PARIS}]"
    ids = [[call.id for call in parser(FORCED).parse(text, complete=True).calls] for _ in range(2)]
    other = ToolParser(FORCED, NAMES, "alice/b").parse(text, complete=True).calls[0].id
    assert ids[0] == ids[1]
    assert len({*ids[0], other}) == 3
    assert all(len(id) == 9 and id.isalnum() for id in ids[0])


def test_without_parallel_calls_the_first_counts():
    assert len(parser(FORCED, most=1).parse(f"[{PARIS}, {NOON}]", complete=True).calls) == 1


@pytest.mark.parametrize("format", [*FORMATS.values(), FORCED], ids=[*FORMATS, "forced"])
@given(data=st.data())
def test_what_is_streamed_is_never_taken_back(format, data):
    """Whatever a model writes, however it is cut: pieces add up to the whole, and a call comes once."""
    bits = [
        "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[", "]", "{", "}", " ", "\n", "a", "<tool", PARIS, NOON, ",",
        PARIS.replace("arguments", "parameters"),
    ]  # fmt: skip
    text = "".join(data.draw(st.lists(st.sampled_from(bits), max_size=12)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    read = parser(format, data.draw(st.sampled_from([None, 1])))
    before = Said("")
    for cut in cuts:
        now = read.parse(text[:cut], complete=False)
        assert now.content.startswith(before.content)
        assert now.calls[: len(before.calls)] == before.calls
        before = now
    whole = read.parse(text, complete=True)
    assert whole.content.startswith(before.content)
    assert whole.calls[: len(before.calls)] == before.calls


def test_a_call_is_streamed_as_soon_as_it_is_whole_and_text_before_it_at_once():
    text = f"Hello there. <tool_call>{PARIS}</tool_call> and <tool_call>{NOON}"
    read = parser(FORMATS["hermes"])
    assert read.parse("Hello there. <tool_", complete=False) == Said("Hello there.")
    assert len(read.parse(text, complete=False).calls) == 1


def test_families_are_known_by_what_their_templates_teach():
    hermes = '<tool_call>\\n{\\"name\\": <function-name>, \\"arguments\\": <args-json-object>}\\n</tool_call>'
    llama = 'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.'
    assert recognise(hermes) is FORMATS["hermes"]
    assert recognise(llama) is FORMATS["llama3_json"]
    assert recognise("[AVAILABLE_TOOLS] {{ tools | tojson }} [TOOL_CALLS]") is FORMATS["mistral"]
    assert recognise("<tool_call>\n<function=name>\n{{ tools }}") is None
    assert recognise("") is None
