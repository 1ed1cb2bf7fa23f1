"""One accepted request while it runs: what its tenant asked for, what it was told so far, and what it is told at the end."""

import secrets
from dataclasses import dataclass, field
from math import inf
from typing import Self

from protocol import openai, replies
from protocol.errors import BadRequest
from protocol.openai import FinishReason, PromptTokensDetails, Usage
from protocol.plan import NO_TOKEN, Sampling, WorkerInfo
from protocol.request import Request
from scheduler.chat import Chat
from scheduler.core.sequence import Sequence
from scheduler.journal.entry import Entry
from scheduler.structure import grammar_for, structure_field
from scheduler.text import Detokenizer, StopStrings
from scheduler.tools import Said, ToolParser


def check_fits(request: Request, prompt: list[int], info: WorkerInfo) -> None:
    """Raises BadRequest for unknown tokens or too many of them."""
    if not prompt:
        raise BadRequest("prompt", "must hold at least one token")
    # One unknown id would fail the forward pass of everyone in its batch.
    unknown = next((index for index, token in enumerate(prompt) if token >= info.vocab_size), None)
    if unknown is not None:
        raise BadRequest(f"prompt[{unknown}]", f"must be a token id below {info.vocab_size}")
    room = info.max_model_len - len(prompt)
    wanted = request.output_limit
    if room < 1 or (wanted is not None and wanted > room):
        raise context_exceeded(request, prompt, f"the context of {info.max_model_len} tokens")


def context_exceeded(request: Request, prompt: list[int], limit: str) -> BadRequest:
    """What a request with a prompt over this limit, or with the tokens it asks for, is refused with."""
    wanted = request.output_limit
    asked = f"{len(prompt)} prompt tokens" + ("" if wanted is None else f" and max_tokens = {wanted}")
    field = "messages" if request.is_chat else "prompt"
    return BadRequest(field, f"{asked} are over {limit}", "context_length_exceeded")


def sequence_for(entry: Entry, info: WorkerInfo) -> Sequence:
    """What the batcher is to run for a request, from where it is. Raises BadRequest as ``check_fits``."""
    request = entry.request
    check_fits(request, entry.prompt, info)
    grammar = grammar_for(request)
    if grammar is not None and not info.eos_ids:
        raise BadRequest(structure_field(request), "this model has no token that ends a text")
    stop_ids = frozenset(request.stop_token_ids or ()) | frozenset(() if request.ignore_eos else info.eos_ids)
    return Sequence(
        entry.id,
        entry.prompt,
        max_tokens=request.output_limit or info.max_model_len - len(entry.prompt),
        stop_ids=stop_ids | {NO_TOKEN},
        sampling=_sampling(request, entry.seed, grammar),
        output=[token for record in entry.records for token in record],
        tenant=entry.tenant,
        priority=request.priority,
        deadline=inf if entry.expires_at is None else entry.expires_at,
    )


def seed_for(request: Request) -> int:
    """A request without a seed gets one, which stays with it."""
    return secrets.randbits(63) if request.seed is None else request.seed


def _sampling(request: Request, seed: int, grammar: str | None) -> Sampling:
    """Defaults as in the OpenAI API: temperature 1, everything kept."""
    return Sampling(
        temperature=1.0 if request.temperature is None else request.temperature,
        top_k=max(request.top_k or 0, 0),
        top_p=1.0 if request.top_p is None else request.top_p,
        min_p=request.min_p or 0.0,
        seed=seed,
        grammar=grammar,
    )


@dataclass(slots=True)
class Generation:
    """Text comes in token by token and goes out in numbered pieces; times are on the engine's clock, in seconds.

    A piece is journalled as the tokens that made it, then published as a chunk if the request streams: after a crash the
    same tokens make the same pieces under the same numbers. ``cuts`` are the text's lengths at the ends of pieces. What a piece
    says follows from the text up to its ends alone, tool calls included.
    """

    entry: Entry
    accepted_at: float
    detokenizer: Detokenizer
    stops: StopStrings
    tools: ToolParser | None = None
    started_at: float | None = None
    first_token_at: float | None = None
    last_token_at: float | None = None
    cached_tokens: int = 0
    completion_tokens: int = 0
    text: str = ""
    cuts: list[int] = field(default_factory=lambda: [0])
    published: int = 0
    _uncut: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, entry: Entry, chat: Chat, accepted_at: float) -> Self:
        """The generation of an entry, with the pieces that were journalled for it."""
        tools = chat.tool_parser(entry.request, entry.id)
        generation = cls(
            entry=entry,
            accepted_at=accepted_at,
            detokenizer=Detokenizer(
                chat.backend, entry.prompt, keep_special=tools is not None and tools.format.is_special
            ),
            stops=StopStrings(entry.request.stop_strings),
            tools=tools,
        )
        for record in entry.records:
            for token in record:
                generation._take(token)
            generation._close_piece()
        generation.published = len(entry.records)
        entry.records = []
        return generation

    @property
    def streams(self) -> bool:
        return self.entry.request.stream

    def push(self, token: int, at: float, finish: FinishReason | None) -> FinishReason | None:
        """Take one token; says why the generation ends, which a stop string may decide before the batcher does."""
        if self.completion_tokens == 0:
            self.first_token_at = at
        self.last_token_at = at
        if finish == "stop":  # a token that stops the sequence is not part of the text
            self.completion_tokens += 1
        else:
            self._take(token)
        if finish is not None and not self.stops.stopped:
            self.text += self.stops.push(self.detokenizer.finish())
            self.text += self.stops.finish()
        return "stop" if self.stops.stopped else finish

    def cut(self) -> tuple[int, list[int]] | None:
        """End a piece here: its number and tokens; None when there is nothing to publish yet."""
        if not self._uncut or (self.streams and self._said(len(self.text)) == self._said(self.cuts[-1])):
            return None
        tokens = self._uncut
        self._close_piece()
        return len(self.cuts) - 2, tokens

    def chunk(self, number: int, reason: FinishReason | None = None) -> replies.Chunk:
        """A piece as it is published; the last one has the reason of the end."""
        before = self._said(self.cuts[number])
        said = self._said(self.cuts[number + 1], complete=reason is not None)
        data = openai.piece(
            chat=self.entry.request.is_chat,
            request_id=self.entry.request_id,
            created=int(self.entry.accepted_at),
            model=self.entry.model,
            text=said.content[len(before.content) :],
            reason=_reason(reason, said) if reason else None,
            first=number == 0,
            calls=said.calls[len(before.calls) :],
            calls_before=len(before.calls),
        )
        return replies.Chunk(self.entry.request_id, number, data)

    def last_chunk(self, reason: FinishReason) -> replies.Chunk | None:
        """The rest, with the reason of the end; None for a request that doesn't stream."""
        self._close_piece()
        return self.chunk(len(self.cuts) - 2, reason) if self.streams else None

    def result(self, reason: FinishReason, at: float) -> replies.Result:
        prompt_tokens = len(self.entry.prompt)
        said = self._said(len(self.text), complete=True)
        data = openai.answer(
            chat=self.entry.request.is_chat,
            request_id=self.entry.request_id,
            created=int(self.entry.accepted_at),
            model=self.entry.model,
            text=said.content,
            reason=_reason(reason, said),
            calls=said.calls,
            usage=Usage(
                prompt_tokens,
                self.completion_tokens,
                prompt_tokens + self.completion_tokens,
                PromptTokensDetails(self.cached_tokens),
            ),
        )
        chunks = len(self.cuts) - 1 if self.streams else 0
        return replies.Result(self.entry.request_id, data, self.timings(at), chunks, self.entry.attempt)

    def timings(self, at: float) -> replies.Timings:
        started = self.started_at if self.started_at is not None else at
        first = self.first_token_at
        return replies.Timings(
            queued_s=started - self.accepted_at,
            ttft_s=None if first is None else first - self.accepted_at,
            total_s=at - self.accepted_at,
        )

    def _said(self, length: int, *, complete: bool = False) -> Said:
        """What this much of the text says."""
        text = self.text[:length]
        return Said(text) if self.tools is None else self.tools.parse(text, complete=complete)

    def _take(self, token: int) -> None:
        self.completion_tokens += 1
        self._uncut.append(token)
        self.text += self.stops.push(self.detokenizer.push(token))

    def _close_piece(self) -> None:
        self._uncut = []
        self.cuts.append(len(self.text))


def _reason(reason: FinishReason, said: Said) -> FinishReason:
    return "tool_calls" if said.calls and reason == "stop" else reason
