"""One accepted request while it runs: what its tenant asked for, what it was told so far, and what it is told at the end."""

import secrets
from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING, NamedTuple, Self

import msgspec

from protocol import openai, replies
from protocol.errors import BadRequest
from protocol.kinds import AnyRequest
from protocol.openai import PromptLogprobs, PromptTokensDetails, Usage
from protocol.plan import NO_TOKEN, Scored, WorkerInfo
from protocol.request import Request
from scheduler.chat import Chat
from scheduler.choice import Choice
from scheduler.core.sequence import FinishReason, Sequence
from scheduler.journal.entry import Entry, Piece, Token, sequence_id
from scheduler.logprobs import prompt_logprobs
from scheduler.sampling import check_sampling, sampling_of, seed_of, stop_ids_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def check_fits(request: Request, prompt: list[int], info: WorkerInfo) -> None:
    """Raises BadRequest for unknown tokens or too many of them."""
    check_tokens("prompt", prompt, info)
    room = info.max_model_len - len(prompt)
    wanted = request.output_limit
    if room < 1 or (wanted is not None and wanted > room):
        raise context_exceeded(request, prompt, f"the context of {info.max_model_len} tokens")
    check_sampling(request, room, info)


def check_tokens(field: str, tokens: list[int], info: WorkerInfo) -> None:
    """Raises BadRequest for none at all, or for unknown ones."""
    if not tokens:
        raise BadRequest(field, "must hold at least one token")
    # One unknown id would fail the forward pass of everyone in its batch.
    unknown = next((index for index, token in enumerate(tokens) if token >= info.vocab_size), None)
    if unknown is not None:
        raise BadRequest(f"{field}[{unknown}]", f"must be a token id below {info.vocab_size}")


def check_adapter(name: str, info: WorkerInfo) -> None:
    """Raises BadRequest for one that isn't served."""
    if name and name not in info.adapters:
        raise BadRequest("model", f"there is no adapter {name!r} here", "model_not_found")


def context_exceeded(request: AnyRequest, prompt: list[int], limit: str) -> BadRequest:
    """What a request with a prompt over this limit, or with the tokens it asks for, is refused with."""
    wanted = request.output_limit
    asked = f"{len(prompt)} prompt tokens" + (f" and max_tokens = {wanted}" if wanted else "")
    return BadRequest(request.prompt_field, f"{asked} are over {limit}", "context_length_exceeded")


def seed_for(request: Request) -> int:
    """A request without a seed gets one, which stays with it."""
    return secrets.randbits(63) if request.seed is None else request.seed


class Part(NamedTuple):
    """A piece of a choice as it is told: from where to where in its text, and whether it is its first, its last."""

    choice: Choice
    start: int
    end: int
    first: bool
    last: bool


@dataclass(slots=True)
class Generation:
    """Text comes in token by token and goes out in pieces, numbered over all choices; times are on the engine's clock, in
    seconds.

    A piece is journalled as the tokens that made it, then published as a chunk if the request streams: after a crash the
    same tokens make the same pieces under the same numbers.
    """

    entry: Entry
    accepted_at: float
    tokenizer: "Tokenizer"
    choices: list[Choice]
    started_at: float | None = None
    first_token_at: float | None = None
    cached_tokens: int = 0
    completion_tokens: int = 0
    parts: list[Part] = field(default_factory=list)
    published: int = 0
    scored_prompt: dict[int, Scored] = field(default_factory=dict)

    @classmethod
    def of(cls, entry: Entry, chat: Chat, accepted_at: float) -> Self:
        """The generation of an entry, with the pieces that were journalled for it."""
        choices = [Choice.of(entry, chat, index) for index in range(entry.request.num_choices)]
        generation = cls(entry, accepted_at, chat.backend, choices)
        for piece in entry.pieces:
            generation.choices[piece.choice].replay(piece)
            generation.completion_tokens += len(piece.tokens)
            generation._close_piece(generation.choices[piece.choice])
        generation.published = len(entry.pieces)
        return generation

    @property
    def request(self) -> Request:
        assert isinstance(self.entry.request, Request)
        return self.entry.request

    @property
    def streams(self) -> bool:
        return self.request.stream

    @property
    def has_spoken(self) -> bool:
        """Whether a token of it came in this process."""
        return any(choice.last_token_at is not None for choice in self.choices)

    @property
    def outcome(self) -> FinishReason:
        """How it has ended: at its length, if a choice did."""
        return "length" if any(choice.reason == "length" for choice in self.choices) else "stop"

    def unended(self) -> list[Choice]:
        return [choice for choice in self.choices if choice.reason is None]

    def push(self, choice: Choice, token: Token, at: float, finish: FinishReason | None) -> None:
        """Take one token of a choice, which may have ended with it: a stop string may decide that before the batcher does."""
        if self.completion_tokens == 0:
            self.first_token_at = at
        self.completion_tokens += 1
        choice.last_token_at = at
        choice.push(token, finish)

    def score_prompt(self, first: int, scored: list[Scored]) -> None:
        """Take the scores of the prompt's tokens from position ``first`` on; some may come again."""
        self.scored_prompt.update(enumerate(scored, start=first))

    def cut(self) -> list[tuple[int, Piece]]:
        """End a piece of every choice that has something to tell: their numbers and what is to be journalled."""
        return [self._close_piece(choice) for choice in self.choices if choice.has_news]

    def cut_last(self) -> range:
        """Numbers of the last published pieces that may have been cut at once: each of a later choice than the one before."""
        first = max(self.published - 1, 0)
        while first > 0 and self.parts[first - 1].choice.index < self.parts[first].choice.index:
            first -= 1
        return range(first, self.published)

    def chunk(self, number: int) -> replies.Chunk:
        """A piece as it is published; the last one of a choice has the reason of its end."""
        choice, start, end, first, last = self.parts[number]
        before = choice.said(start)
        said = choice.said(end, complete=last)
        data = openai.piece(
            chat=self.request.is_chat,
            request_id=self.entry.request_id,
            created=int(self.entry.accepted_at),
            model=self.request.model or self.entry.model,
            text=said.content[len(before.content) :],
            reason=choice.told_reason(said) if last else None,
            first=first,
            index=choice.index,
            calls=said.calls[len(before.calls) :],
            calls_before=len(before.calls),
            logprobs=choice.logprobs(start, end, last=last),
        )
        return replies.Chunk(self.entry.request_id, number, data)

    def last_chunks(self) -> list[replies.Chunk]:
        """The rest, once it has ended; nothing for a request that doesn't stream."""
        numbers = [number for number, _ in self.cut()]
        return [self.chunk(number) for number in numbers] if self.streams else []

    def result(self, at: float) -> replies.Result:
        """All that it says, once it has ended."""
        prompt_tokens = len(self.entry.prompt)
        data = openai.answer(
            chat=self.request.is_chat,
            request_id=self.entry.request_id,
            created=int(self.entry.accepted_at),
            model=self.request.model or self.entry.model,
            answers=[choice.answer() for choice in self._best()],
            usage=Usage(
                prompt_tokens,
                self.completion_tokens,
                prompt_tokens + self.completion_tokens,
                PromptTokensDetails(self.cached_tokens),
            ),
            prompt_logprobs=self._prompt_logprobs(),
        )
        chunks = len(self.parts) if self.streams else 0
        return replies.Result(self.entry.request_id, data, self.timings(at), chunks, self.entry.attempt)

    def timings(self, at: float) -> replies.Timings:
        started = self.started_at if self.started_at is not None else at
        first = self.first_token_at
        return replies.Timings(
            queued_s=started - self.accepted_at,
            ttft_s=None if first is None else first - self.accepted_at,
            total_s=at - self.accepted_at,
        )

    def _best(self) -> list[Choice]:
        """The choices to be told: where there are more than were asked for, the likeliest per token, best first."""
        wanted = self.request.n
        if len(self.choices) == wanted:
            return self.choices
        return sorted(self.choices, key=lambda choice: -choice.logprob / choice.completion_tokens)[:wanted]

    def _prompt_logprobs(self) -> PromptLogprobs | msgspec.UnsetType:
        if self.request.prompt_logprobs is None:
            return msgspec.UNSET
        return prompt_logprobs(self.entry.prompt, self.scored_prompt, self.tokenizer)

    def _close_piece(self, choice: Choice) -> tuple[int, Piece]:
        start, first = choice.cut_at, not choice.is_begun
        piece = choice.cut()
        self.parts.append(Part(choice, start, choice.cut_at, first, choice.is_closed))
        return len(self.parts) - 1, piece


def sequences_for(generation: Generation, info: WorkerInfo) -> list[Sequence]:
    """What the batcher is to run, from where it is: a sequence for each choice that hasn't ended, the first of which scores the
    prompt if that is asked for."""
    entry, request = generation.entry, generation.request
    sampling = sampling_of(request, entry.seed, info, generation.tokenizer)
    without = msgspec.structs.replace(sampling, prompt_logprobs=None)
    return [
        Sequence(
            sequence_id(entry.id, choice.index),
            entry.prompt,
            max_tokens=request.output_limit or info.max_model_len - len(entry.prompt),
            stop_ids=stop_ids_of(request, info) | {NO_TOKEN},
            sampling=msgspec.structs.replace(without if number else sampling, seed=seed_of(entry.seed, choice.index)),
            output=choice.output,
            tenant=entry.tenant,
            priority=request.priority,
            deadline=inf if entry.expires_at is None else entry.expires_at,
            adapter=request.adapter,
        )
        for number, choice in enumerate(generation.unended())
    ]
