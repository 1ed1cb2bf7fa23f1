"""Tokens into text: incremental detokenisation and stop strings."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tokenizers.decoders import DecodeStream

if TYPE_CHECKING:
    from tokenizers import Tokenizer

#: How many prompt tokens the detokeniser sees first, so that it knows whether the text goes on after a space.
_CONTEXT_TOKENS = 6
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """Turns one sequence's tokens into text as they come; never gives half a character, and special tokens only if told to."""

    def __init__(self, tokenizer: "Tokenizer", prompt: Sequence[int], *, keep_special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skip_special = not keep_special
        self._stream = DecodeStream(ids=list(prompt[-_CONTEXT_TOKENS:]), skip_special_tokens=self._skip_special)
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
        held = self._tokenizer.decode(self._held, skip_special_tokens=self._skip_special)
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
        keep = max((overlap(text, stop) for stop in self._stops), default=0)
        cut = len(text) - keep
        self._held = text[cut:]
        return text[:cut]

    def finish(self) -> str:
        """What was held back, now that nothing can complete it."""
        held, self._held = self._held, ""
        return held


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that ``stop`` begins with."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
