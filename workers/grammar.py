"""Structured output: which tokens the grammar of each slot allows next, found on the host while the forward pass runs.

llguidance follows the grammars. It builds its automata as a text goes on, so compiling takes milliseconds and a step of it is
bounded by its limits. All of that happens in one thread of our own, which lets go of the interpreter's lock.

Drafts (``drafts.py``) that a grammar forbids are cut off before they are computed; each place behind one that it allows has a
mask of its own, so that what is sampled there is what would be without drafts.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import llguidance.numpy
import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from torch import Tensor

from protocol.plan import NO_TOKEN, Admission
from workers.transfer import index, send

#: A quarter of llguidance's own limits on a step, some milliseconds of work: whoever shares the batch waits for it. A state takes
#: 1 to 2 KB, so a compiled grammar at most some 40 MB.
_LIMITS = LLParserLimits(step_lexer_fuel=50_000, step_max_items=12_500, max_lexer_states=20_000, verbose_errors=False)
#: Compiled grammars that are kept; each takes memory as it is used.
_MOST_COMPILED = 32


#: Who follows a grammar, and tokens.
_Look = tuple[Future[LLMatcher], list[int]]


@dataclass(frozen=True, slots=True)
class Allowed:
    """``tokens``: bool ``[rows, V]``. ``lost``: which of the rows can be followed no further; they allow anything."""

    tokens: np.ndarray
    lost: np.ndarray


@dataclass(frozen=True, slots=True)
class Mask:
    """What is allowed in ``rows`` of a step's logits, those of slots that have a grammar."""

    rows: list[int]
    allowed: Future[Allowed]

    def apply(self, logits: Tensor) -> Tensor:
        """Logits ``[n, V]`` with -inf for what isn't allowed; those that were given stay, for scores are the model's own."""
        (allowed,) = send([self.allowed.result().tokens], logits.device)
        if len(self.rows) == len(logits):
            return logits.masked_fill(~allowed, -torch.inf)
        at = index(self.rows, logits.device)
        masked = logits.clone()
        masked[at] = logits[at].masked_fill(~allowed, -torch.inf)
        return masked

    def told(self, tokens: list[int]) -> list[int]:
        """What was sampled, with `NO_TOKEN` where there was nothing to follow, or where all that was allowed was a bad word."""
        told = tokens.copy()
        allowed = self.allowed.result()
        for number, row in enumerate(self.rows):
            if allowed.lost[number] or not allowed.tokens[number, tokens[row]]:
                told[row] = NO_TOKEN
        return told


class Grammars:
    """The grammars of the slots that have one, and how far each has got.

    ``path`` holds tokenizer.json, which is read when the first grammar comes. Costs nothing where no slot has a grammar.
    """

    def __init__(self, path: Path, vocab_size: int, eos_ids: list[int]) -> None:
        self._path = path
        self._vocab_size = vocab_size
        self._eos_ids = eos_ids
        self._matchers: dict[int, Future[LLMatcher]] = {}
        self._sampled: list[_Look] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._compile = lru_cache(_MOST_COMPILED)(self._compile_anew)
        self._tokenizer: LLTokenizer | None = None

    def __contains__(self, slot: int) -> bool:
        return slot in self._matchers

    def assign(self, admission: Admission) -> None:
        """From now on the slot follows the admission's grammar, from where its output is, or none."""
        self._matchers.pop(admission.slot, None)
        grammar = admission.sampling.grammar
        if grammar is not None:
            output = admission.tokens[admission.prompt_len :]
            self._matchers[admission.slot] = self._thread.submit(self._match, grammar, output)

    def check(self, drafts: dict[int, list[int]]) -> dict[int, list[int]]:
        """Of what was drafted for these slots, which have a grammar, as much as that allows."""
        looks = [(self._matchers[slot], tokens) for slot, tokens in drafts.items()]
        counts = self._thread.submit(self._count, looks).result()
        return {slot: tokens[:count] for (slot, tokens), count in zip(drafts.items(), counts, strict=True)}

    def mask(self, slots: list[int], drafts: dict[int, list[int]]) -> Mask | None:
        """Begin to find what is allowed in these slots, one a row; None when none of them has a grammar.

        A slot with ``drafts``, which its grammar allows, has a row for what comes next and, right behind it, one for what comes
        after each of them.
        """
        rows = [row for row, slot in enumerate(slots) if slot in self._matchers] if self._matchers else []
        if not rows:
            return None
        looks = [(self._matchers[slot], drafts.get(slot, [])) for slot in dict.fromkeys(slots[row] for row in rows)]
        return Mask(rows, self._thread.submit(self._look, looks))

    def advance(self, told: Iterable[tuple[int, list[int]]]) -> None:
        """Of each slot, the tokens that it goes on with."""
        for slot, tokens in told:
            if slot in self._matchers and NO_TOKEN not in tokens:
                self._sampled.append((self._matchers[slot], tokens))

    def _match(self, grammar: str, output: list[int]) -> LLMatcher:
        matcher = self._compile(grammar).deep_copy()
        matcher.consume_tokens(output)
        return matcher

    def _compile_anew(self, grammar: str) -> LLMatcher:
        if self._tokenizer is None:
            text = (self._path / "tokenizer.json").read_text()
            self._tokenizer = LLTokenizer(text, n_vocab=self._vocab_size, eos_token=self._eos_ids)
        return LLMatcher(self._tokenizer, grammar, log_level=0, limits=_LIMITS)

    def _follow(self) -> None:
        sampled, self._sampled = self._sampled, []
        for matcher, tokens in sampled:
            matcher.result().consume_tokens(tokens)

    def _count(self, looks: list[_Look]) -> list[int]:
        self._follow()
        return [matcher.result().deep_copy().validate_tokens(drafts) for matcher, drafts in looks]

    def _look(self, looks: list[_Look]) -> Allowed:
        self._follow()
        count = sum(1 + len(drafts) for _, drafts in looks)
        bits = llguidance.numpy.allocate_token_bitmask(count, self._vocab_size)
        lost = np.zeros(count, dtype=np.bool_)
        states = (state for matcher, drafts in looks for state in _ahead(matcher.result(), drafts))
        for row, state in enumerate(states):
            llguidance.numpy.fill_next_token_bitmask(state, bits, row)
            lost[row] = state.is_error()
        bits[lost] = -1
        tokens = np.unpackbits(bits.view(np.uint8), axis=1, bitorder="little", count=self._vocab_size)
        return Allowed(tokens.view(np.bool_), lost)


def _ahead(matcher: LLMatcher, drafts: list[int]) -> Iterator[LLMatcher]:
    """Where it stands, and after each of the drafts: there on a copy, which may fail where the text never goes."""
    yield matcher
    ahead = matcher.deep_copy() if drafts else matcher
    for draft in drafts:
        ahead.consume_token(draft)
        yield ahead
