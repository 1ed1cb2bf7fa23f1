"""Log probabilities as a tenant gets them: with each token's text, and where in the answer it begins."""

import re
from bisect import bisect_left
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

from protocol.openai import PromptLogprob, TokenLogprob, TokenLogprobs, TopLogprob
from protocol.plan import Scored

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# The alphabet of byte-level BPE (GPT-2): what can be printed of Latin-1 stands for itself, the other bytes, in order, for
# the code points from 256 on.
_PRINTED = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTED]
_BYTES = {chr(byte): byte for byte in _PRINTED} | {chr(256 + at): byte for at, byte in enumerate(_OTHERS)}
_SPACE = "Ġ"
_BYTE_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")
_BEFORE = "a"


@lru_cache(maxsize=1 << 17)
def token_bytes(tokenizer: "Tokenizer", token: int) -> bytes:
    """What a token adds to a text, in UTF-8: perhaps part of a character. Empty for one that the tokenizer doesn't know."""
    piece: str = tokenizer.id_to_token(token) or ""
    if (byte := _BYTE_FALLBACK.fullmatch(piece)) is not None:
        return bytes.fromhex(byte[1])
    if tokenizer.decoder is None:
        return piece.encode()
    if tokenizer.decoder.decode([_SPACE]) == " " and _BYTES.keys() >= set(piece):
        return bytes(_BYTES[char] for char in piece)
    # After another one, for some decoders strip the space that a text begins with.
    text: str = tokenizer.decoder.decode([_BEFORE, piece])
    return text.removeprefix(_BEFORE).encode()


def token_text(tokenizer: "Tokenizer", token: int) -> str:
    r"""A token's text, with ``\xf0`` for a byte that is no whole character."""
    return token_bytes(tokenizer, token).decode(errors="backslashreplace")


@dataclass(slots=True)
class ScoredText:
    """The scored tokens of one answer, in order, each with the ``offset`` in characters at which its text begins."""

    tokens: list[Scored] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)

    def add(self, scored: Scored, offset: int) -> None:
        self.tokens.append(scored)
        self.offsets.append(offset)

    def between(self, start: int, end: int | None, tokenizer: "Tokenizer") -> TokenLogprobs:
        """Those that begin at ``start`` or later and before ``end``; None: all the rest."""
        first = bisect_left(self.offsets, start)
        last = len(self.offsets) if end is None else bisect_left(self.offsets, end)
        tokens = [_token_logprob(scored, tokenizer) for scored in self.tokens[first:last]]
        return TokenLogprobs(tokens, self.offsets[first:last])


def prompt_logprobs(
    prompt: list[int], scored: dict[int, Scored], tokenizer: "Tokenizer"
) -> list[dict[int, PromptLogprob] | None]:
    """For each token of a prompt, itself and the likeliest in its place; ``scored`` is by position, which the first has not."""
    return [_alternatives(scored[at], tokenizer) if at in scored else None for at in range(len(prompt))]


def _token_logprob(scored: Scored, tokenizer: "Tokenizer") -> TokenLogprob:
    top = [
        TopLogprob(token_text(tokenizer, token), logprob, list(token_bytes(tokenizer, token)))
        for token, logprob in scored.top
    ]
    own = scored.token
    return TokenLogprob(token_text(tokenizer, own), scored.logprob, list(token_bytes(tokenizer, own)), top)


def _alternatives(scored: Scored, tokenizer: "Tokenizer") -> dict[int, PromptLogprob]:
    ranked = [(token, logprob, rank) for rank, (token, logprob) in enumerate(scored.top, start=1)]
    return {
        token: PromptLogprob(logprob, rank, token_text(tokenizer, token))
        for token, logprob, rank in [*ranked, (scored.token, scored.logprob, scored.rank)]
    }
