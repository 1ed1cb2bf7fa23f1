"""The fields of requests as tables for the documentation: type and range from their types, the rest from here.

``python -m protocol.parameters`` prints the tables that a test holds docs/protocol.md and docs/embeddings.md against.
"""

from typing import Any

import msgspec

from protocol.kinds import BODIES, AnyRequest
from protocol.prefill import EmbeddingRequest, ScoreRequest
from protocol.request import Request

_MODELS = "absent: the model's own, else"

MEANINGS = {
    "messages": "the chat to go on with: one of the two must be given",
    "prompt": "the text to go on with, as text or token ids",
    "add_generation_prompt": "end the prompt with the beginning of an assistant's message",
    "continue_final_message": "the answer goes on where the last message ends; needs `add_generation_prompt` false",
    "tools": "functions that the model may call, with the JSON schemas of their `parameters`",
    "tool_choice": "which of them, if any: a `NamedTool` is one by its name; absent: `auto`",
    "parallel_tool_calls": "false: one call at most",
    "response_format": "the structure of the answer: any text, any JSON object, or JSON of a schema",
    "structured_outputs": "the same by one of `json` (a schema), `regex`, `choice`, `grammar`",
    "model": "absent, or the model that the topic names, perhaps with a LoRA adapter: `smollm2:formal`",
    "max_tokens": "with the prompt at most the context; absent: up to it",
    "max_completion_tokens": "the same under its newer name",
    "min_tokens": "until there are so many, no end or stop token is drawn and no stop string is looked for",
    "temperature": f"0 is greedy; {_MODELS} 1",
    "top_k": f"of the k likeliest only; 0 and -1 are off; {_MODELS} off",
    "top_p": f"of the likeliest only that together reach p; {_MODELS} 1",
    "min_p": f"none that is less likely than p times the likeliest; {_MODELS} 0",
    "typical_p": f"of the most typical only that together reach p; {_MODELS} 1",
    "repetition_penalty": f"over 1: against tokens of prompt and output; {_MODELS} 1",
    "presence_penalty": "over 0: against tokens that the output has",
    "frequency_penalty": "over 0: against tokens that the output has, each time that it has them",
    "logit_bias": "token ids, and what is added to their logits",
    "bad_words": "never generated, at the beginning of a text or after a space; each as the tokenizer splits it",
    "seed": "the same seed gives the same tokens at any load; absent: drawn",
    "stop": "strings that the text ends before",
    "stop_token_ids": "tokens that end it as the model's end token does",
    "include_stop_str_in_output": "the text ends after the stop string or token instead",
    "ignore_eos": "go on after the model's end token",
    "logprobs": "log probabilities of the output: for `messages` whether, for `prompt` with how many of the likeliest tokens",
    "top_logprobs": "with how many of the likeliest tokens, for `messages` with `logprobs`",
    "prompt_logprobs": "log probabilities of the prompt, with how many of the likeliest tokens; they come with the result",
    "stream": "send chunks too",
    "stream_options": "not acted on: usage always comes with the result",
    "n": "so many answers; the prompt is computed, and counted, once. Services allow fewer, 16 unless configured otherwise",
    "best_of": "so many are generated, and the `n` with the highest log probability per token told; absent: `n`",
    "user": "not acted on",
    "metadata": "not acted on",
    "priority": "among your requests a higher one goes first; it buys nothing from other tenants",
    "deadline_ms": "it ends that long after it was taken in, done or not",
    "refuse_late": "refuse it at once when it would be late; needs a deadline",
}

_TURN = {name: MEANINGS[name] for name in ("model", "user", "priority", "deadline_ms", "refuse_late")}

#: Of each kind's body, in the order in which they are told.
FIELDS: dict[type[AnyRequest], dict[str, str]] = {
    Request: MEANINGS,
    EmbeddingRequest: {
        "input": "what to embed: a text, a list of texts, a list of token ids, or a list of such lists; at most 2,048 texts",
        "pooling": "`last`: the hidden state of the last token; `mean`: that of all tokens on average",
        "normalize": "each vector is made 1 long",
        "encoding_format": "`base64`: of the numbers as float32, little-endian",
        "dimensions": "as many as the model's hidden states have: nothing is cut off",
        **_TURN,
    },
    ScoreRequest: {
        "text": "what to score, as text or token ids",
        "context": "what comes before it, likewise",
        "logprobs": "with how many of the likeliest tokens in each place",
        **_TURN,
    },
}


def table(body: type[AnyRequest] = Request) -> str:
    """A row of Markdown for each field of a request."""
    (_,), schemas = msgspec.json.schema_components([body])
    schema = schemas[body.__name__]["properties"]
    rows = [
        f"| `{name}` | {_type(schema[name])} | {_default(schema[name])} | {meaning} |\n"
        for name, meaning in FIELDS[body].items()
    ]
    return "| field | type and range | default | meaning |\n|---|---|---|---|\n" + "".join(rows)


def _type(schema: dict[str, Any]) -> str:
    """What a JSON schema lets through, in words."""
    options = [_type(option) for option in schema.get("anyOf", ()) if option.get("type") != "null"]
    options += [f"`{value}`" for value in schema.get("enum", ())]
    if options:
        return " or ".join(options)
    if "$ref" in schema:
        return f"`{schema['$ref'].rpartition('/')[2]}`"
    match schema["type"]:
        case "array":
            return f"list of {_type(schema['items'])}{_range(schema, 'Items', 'entries')}"
        case "object":
            return f"object of {_type(schema['additionalProperties'])}{_range(schema, 'Properties', 'entries')}"
        case "string":
            return f"string{_range(schema, 'Length', 'characters')}"
        case kind:
            return f"{kind}{_numbers(schema)}"


def _numbers(schema: dict[str, Any]) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    if (above := schema.get("exclusiveMinimum")) is not None:
        return f" over {above}, to {high}"
    if low is None:
        return ""
    below = schema.get("exclusiveMaximum")
    return f" from {low:,}" + (f" to {high:,}" if high is not None else f", below {below:,}")


def _range(schema: dict[str, Any], what: str, unit: str) -> str:
    low, high = schema.get(f"min{what}", 0), schema.get(f"max{what}")
    return "" if high is None else f" ({low} to {high:,} {unit})"


def _default(schema: dict[str, Any]) -> str:
    if "default" not in schema:
        return "must be given"
    default = schema["default"]
    return "" if default is None else f"`{msgspec.json.encode(default).decode()}`"


if __name__ == "__main__":
    print("\n".join(map(table, BODIES.values())), end="")
