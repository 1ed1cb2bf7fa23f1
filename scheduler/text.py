"""Text in and out of tokens: chat template and tokenizer going in, incremental detokenisation and stop strings coming out."""

from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

from jinja2.exceptions import TemplateError
from tokenizers.decoders import DecodeStream

from protocol.errors import BadRequest
from protocol.request import Request

if TYPE_CHECKING:
    from tokenizers import Tokenizer

#: How many prompt tokens the detokeniser sees first, so that it knows whether the text goes on after a space.
_CONTEXT_TOKENS = 6
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def preload() -> None:
    """Import what takes a second, so that a thread can while the worker starts."""
    import transformers  # noqa: PLC0415

    # Not AutoTokenizer, which would import torch: two seconds and 250 MB that only a worker needs.
    transformers.PreTrainedTokenizerFast  # noqa: B018 - it is imported at the first access


class Text:
    """The tokenizer of one model. Thread-safe."""

    def __init__(self, path: str) -> None:
        from transformers import PreTrainedTokenizerFast  # noqa: PLC0415 - see preload

        self._tokenizer = PreTrainedTokenizerFast.from_pretrained(path)

    @property
    def backend(self) -> "Tokenizer":
        backend: Tokenizer = self._tokenizer.backend_tokenizer
        return backend

    def prompt_tokens(self, request: Request) -> list[int]:
        """Token ids of the prompt, through the chat template for messages. Raises BadRequest."""
        if request.messages is None:
            if isinstance(request.prompt, list):
                return request.prompt
            return list(self._tokenizer.encode(request.prompt or ""))
        return self._render([{"role": message.role, "content": message.text} for message in request.messages])

    def system_tokens(self, system: str) -> list[int]:
        """The token ids that every chat with this system message begins with. Raises BadRequest."""
        chats = [[{"role": "system", "content": system}, {"role": "user", "content": user}] for user in ("a", "1")]
        common = takewhile(lambda pair: pair[0] == pair[1], zip(*map(self._render, chats), strict=False))
        return [token for token, _ in common]

    def _render(self, messages: list[dict[str, str]]) -> list[int]:
        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except (TemplateError, ValueError) as error:
            raise BadRequest("messages", f"the model's chat template refuses them: {error}") from None
        return list(self._tokenizer.encode(text, add_special_tokens=False))


class Detokenizer:
    """Turns one sequence's tokens into text as they come; never gives half a character."""

    def __init__(self, tokenizer: "Tokenizer", prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(ids=list(prompt[-_CONTEXT_TOKENS:]), skip_special_tokens=True)
        self._held: list[int] = []

    def push(self, token: int) -> str:
        """The text that is certain now: empty while a character is incomplete."""
        piece = self._stream.step(self._tokenizer, token)
        if piece is None:
            self._held.append(token)
            return ""
        self._held.clear()
        return str(piece)

    def finish(self) -> str:
        """What was held back, without the character that never was completed."""
        held = self._tokenizer.decode(self._held, skip_special_tokens=True)
        self._held.clear()
        return str(held).rstrip(_REPLACEMENT)


class StopStrings:
    """Passes text on up to the first stop string, or with ``include`` to its end; holds back what may become one."""

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._stops = stops
        self._include = include
        self._held = ""
        self.stopped = False

    def push(self, text: str, *, search: bool = True) -> str:
        """Text that may be published now; once ``stopped``, nothing follows. Without ``search`` no stop string may end here."""
        before = len(self._held)
        text = self._held + text
        # What ends in text that was held back ended too early, or it would have been found then.
        places = [(text.find(stop, max(before + 1 - len(stop), 0)), len(stop)) for stop in self._stops if search]
        found = [(at, length) for at, length in places if at >= 0]
        if found:
            self.stopped = True
            self._held = ""
            at, length = min(found)
            return text[: at + length * self._include]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        cut = len(text) - keep
        self._held = text[cut:]
        return text[:cut]

    def finish(self) -> str:
        """What was held back, now that nothing can complete it."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that ``stop`` begins with."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
