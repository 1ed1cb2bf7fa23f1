"""Chats through chat templates: roles, tools, calls that were made, messages that go on, and templates that refuse."""

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from protocol.chat import Function, FunctionCall, FunctionChoice, Message, NamedTool, Tool, ToolCall
from protocol.errors import BadRequest
from protocol.request import Request
from scheduler.chat import Chat
from scheduler.text import Detokenizer
from scheduler.tools import FORCED, FORMATS
from tests.scheduler.test_text import byte_tokenizer

HERMES = """{% if tools %}<tools>{{ tools | tojson }}</tools> Call with <tool_call>{"name": <function-name>}</tool_call>
{% endif %}{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% for call in message.tool_calls or [] %}
<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|end|>{% endfor %}
{% if add_generation_prompt %}<|assistant|>{% endif %}"""
STRICT = """{{ raise_exception("roles must alternate") if messages[0].role != "user" }}{{ messages[0].content }}"""
UNKNOWN = "{{ tools }}{{ messages }}"
FRAGILE = "{{ messages[0].metadata['a'] + 1 }}"

WEATHER = Tool(Function("weather", "Tells it", {"type": "object", "properties": {"city": {"type": "string"}}}))
ASKED = [Message("user", "Hi")]


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    def make(template: str, tool_parser=None, special: tuple[str, ...] = ()) -> Chat:
        folder: Path = tmp_path_factory.mktemp("tokenizer")
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(), chat_template=template)
        tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
        tokenizer.save_pretrained(folder)
        return Chat(str(folder), tool_parser)

    return make


def rendered(chat: Chat, **fields) -> str:
    return chat.backend.decode(chat.prompt_tokens(Request(**fields)), skip_special_tokens=False)


def test_all_roles_reach_the_template_with_what_belongs_to_them(chat):
    call = ToolCall("c1", FunctionCall("weather", '{"city": "Paris"}'))
    messages = [
        Message("system", "Be brief."),
        Message("user", "Weather?"),
        Message("assistant", tool_calls=[call]),
        Message("tool", "Rain", tool_call_id="c1"),
    ]
    text = rendered(chat(HERMES), messages=messages, tools=[WEATHER])
    assert json.loads(text[len("<tools>") : text.index("</tools>")])[0]["function"]["name"] == "weather"
    assert '<|assistant|><tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>' in text
    assert text.endswith("<|tool|>Rain<|end|><|assistant|>")


def test_tools_that_may_not_be_called_are_not_shown(chat):
    plain = rendered(chat(HERMES), messages=ASKED)
    assert rendered(chat(HERMES), messages=ASKED, tools=[WEATHER], tool_choice="none") == plain
    assert chat(HERMES).tool_parser(Request(messages=ASKED, tools=[WEATHER], tool_choice="none"), "a/b") is None


def test_a_message_goes_on_where_it_ends(chat):
    messages = [*ASKED, Message("assistant", "Once upon")]
    fields = {"add_generation_prompt": False, "continue_final_message": True}
    assert rendered(chat(HERMES), messages=messages, **fields).endswith("<|assistant|>Once upon")
    assert rendered(chat(HERMES), messages=messages, add_generation_prompt=False).endswith("Once upon<|end|>")


@pytest.mark.parametrize(
    ("template", "fields", "field", "says"),
    [
        (STRICT, {"messages": [Message("system", "x")]}, "messages", "roles must alternate"),
        (FRAGILE, {"messages": ASKED}, "messages", "refuses them"),
        ("{{ messages[0]", {"messages": ASKED}, "messages", "refuses them"),
        (STRICT, {"messages": ASKED, "tools": [WEATHER]}, "tools", "no place for tools"),
        (UNKNOWN, {"messages": ASKED, "tools": [WEATHER]}, "tools", "no format that is known"),
        (
            "{{ messages[0].role }}",
            {"messages": ASKED, "continue_final_message": True, "add_generation_prompt": False},
            "messages",
            "content",
        ),
    ],
)
def test_what_a_template_can_not_do_is_the_senders_to_know(chat, template, fields, field, says):
    with pytest.raises(BadRequest) as caught:
        chat(template).prompt_tokens(Request(**fields))
    assert caught.value.body.param == field
    assert says in caught.value.body.message


@pytest.mark.parametrize("choice", ["required", NamedTool(FunctionChoice("weather"))])
def test_a_call_can_be_forced_from_a_model_whose_format_is_not_known(chat, choice):
    request = Request(messages=ASKED, tools=[WEATHER], tool_choice=choice)
    assert chat(UNKNOWN).prompt_tokens(request)
    assert chat(UNKNOWN).tool_parser(request, "a/b").format is FORCED


def test_the_format_can_be_configured(chat):
    request = Request(messages=ASKED, tools=[WEATHER])
    assert chat(HERMES).tool_parser(request, "a/b").format is FORMATS["hermes"]
    assert chat(HERMES, "llama3_json").tool_parser(request, "a/b").format is FORMATS["llama3_json"]


def test_a_marker_that_is_a_special_token_is_kept(chat):
    model = chat(UNKNOWN, "mistral", special=("[TOOL_CALLS]",))
    text = '[TOOL_CALLS] [{"name": "weather", "arguments": {}}]'
    detokenizer = Detokenizer(model.backend, [1], keep_special=True)
    pieces = "".join(map(detokenizer.push, model.backend.encode(text, add_special_tokens=False).ids))
    heard = pieces + detokenizer.finish()
    parser = model.tool_parser(Request(messages=ASKED, tools=[WEATHER]), "a/b")
    assert parser.format.is_special
    assert len(parser.parse(heard, complete=True).calls) == 1


def test_the_system_prefix_of_all_chats_is_found(chat):
    model = chat(HERMES)
    prefix = model.system_tokens("Be brief.")
    whole = model.prompt_tokens(Request(messages=[Message("system", "Be brief."), *ASKED]))
    assert 0 < len(prefix) < len(whole)
    assert whole[: len(prefix)] == prefix
