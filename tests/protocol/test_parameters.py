"""The table of parameters in docs/protocol.md is what the code says, and nothing of OpenAI's API is left out."""

import re
from pathlib import Path

import msgspec
import pytest
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_create_params

from protocol import parameters
from protocol.errors import BadRequest
from protocol.kinds import BODIES
from protocol.prefill import EmbeddingRequest, ScoreRequest
from protocol.request import Request, decode_request

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "protocol.md").read_text()
OPENAI = {
    name
    for kind in (completion_create_params.CompletionCreateParamsBase, chat_create_params.CompletionCreateParamsBase)
    for name in kind.__required_keys__ | kind.__optional_keys__
}


def test_the_page_holds_the_table_that_the_code_makes():
    assert parameters.table() in PAGE, "run `python -m protocol.parameters` and put its table into docs/protocol.md"


@pytest.mark.parametrize("body", [EmbeddingRequest, ScoreRequest])
def test_so_does_the_page_of_what_generates_nothing(body):
    page = (DOCS / "embeddings.md").read_text()
    assert parameters.table(body) in page, (
        "run `python -m protocol.parameters` and put its tables into docs/embeddings.md"
    )


def test_every_field_is_explained_and_nothing_else():
    assert list(parameters.MEANINGS) == list(Request.__struct_fields__)
    for body in BODIES.values():
        assert sorted(parameters.FIELDS[body]) == sorted(body.__struct_fields__)


def test_embeddings_are_asked_for_as_of_openai():
    params = embedding_create_params.EmbeddingCreateParams
    assert (params.__required_keys__ | params.__optional_keys__) <= set(EmbeddingRequest.__struct_fields__)


def test_the_page_names_what_is_refused_of_openai_s_parameters():
    (sentence,) = re.findall(r"^Of OpenAI's parameters (.*) are refused", PAGE, flags=re.MULTILINE)
    refused = re.findall(r"`(\w+)`", sentence)
    expected = sorted(OPENAI - set(Request.__struct_fields__))
    assert refused == expected, "the page should say " + ", ".join(f"`{name}`" for name in expected)


@pytest.mark.parametrize("name", sorted(OPENAI - set(Request.__struct_fields__)))
def test_what_is_refused_is_refused_by_name(name):
    with pytest.raises(BadRequest, match=f"unknown field `{name}`"):
        decode_request(msgspec.json.encode({"prompt": "a", name: None}))
