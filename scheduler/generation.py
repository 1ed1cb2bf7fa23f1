"""One accepted request while it runs: what its tenant asked for, what it was told so far, and what it is told at the end."""

import secrets
from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING, Self

import msgspec

from protocol import openai, replies
from protocol.errors import BadRequest
from protocol.kinds import AnyRequest
from protocol.openai import FinishReason, PromptLogprobs, PromptTokensDetails, TokenLogprobs, Usage
from protocol.plan import NO_TOKEN, Scored, WorkerInfo
from protocol.request import Request
from scheduler.chat import Chat
from scheduler.core.sequence import Sequence
from scheduler.journal.entry import Entry, Token, token_id
from scheduler.logprobs import ScoredText, prompt_logprobs
from scheduler.sampling import check_sampling, sampling_of, stop_ids_of
from scheduler.text import Detokenizer, StopStrings
from scheduler.tools import Said, ToolParser

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


def sequence_for(entry: Entry, info: WorkerInfo, tokenizer: "Tokenizer") -> Sequence:
    """What the batcher is to run for a request, from where it is. Raises BadRequest as ``check_fits``."""
    request = _asked(entry)
    check_adapter(request.adapter, info)
    check_fits(request, entry.prompt, info)
    return Sequence(
        entry.id,
        entry.prompt,
        max_tokens=request.output_limit or info.max_model_len - len(entry.prompt),
        stop_ids=stop_ids_of(request, info) | {NO_TOKEN},
        sampling=sampling_of(request, entry.seed, info, tokenizer),
        output=[token_id(token) for record in entry.records for token in record],
        tenant=entry.tenant,
        priority=request.priority,
        deadline=inf if entry.expires_at is None else entry.expires_at,
        adapter=request.adapter,
    )


def seed_for(request: Request) -> int:
    """A request without a seed gets one, which stays with it."""
    return secrets.randbits(63) if request.seed is None else request.seed


@dataclass(slots=True)
class Generation:
    """Text comes in token by token and goes out in numbered pieces; times are on the engine's clock, in seconds.

    A piece is journalled as the tokens that made it, then published as a chunk if the request streams: after a crash the
    same tokens make the same pieces under the same numbers. ``cuts`` are the text's lengths at the ends of pieces. What a piece
    says follows from the text up to its ends alone, tool calls included.

    Scores are journalled with their tokens. A piece tells those of the tokens that begin in it, so nothing of a stop string.
    """

    entry: Entry
    accepted_at: float
    tokenizer: "Tokenizer"
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
    scored: ScoredText = field(default_factory=ScoredText)
    scored_prompt: dict[int, Scored] = field(default_factory=dict)
    _uncut: list[Token] = field(default_factory=list)
    _decoded: int = 0

    @classmethod
    def of(cls, entry: Entry, chat: Chat, accepted_at: float) -> Self:
        """The generation of an entry, with the pieces that were journalled for it."""
        request = _asked(entry)
        tools = chat.tool_parser(request, entry.id)
        generation = cls(
            entry=entry,
            accepted_at=accepted_at,
            tokenizer=chat.backend,
            detokenizer=Detokenizer(
                chat.backend, entry.prompt, keep_special=tools is not None and tools.format.is_special
            ),
            stops=StopStrings(request.stop_strings, include=request.include_stop_str_in_output),
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
    def request(self) -> Request:
        return _asked(self.entry)

    @property
    def sequence_ids(self) -> tuple[str, ...]:
        return (self.entry.id,)

    @property
    def streams(self) -> bool:
        return self.request.stream

    def push(self, token: Token, at: float, finish: FinishReason | None) -> FinishReason | None:
        """Take one token; says why the generation ends, which a stop string may decide before the batcher does."""
        if self.completion_tokens == 0:
            self.first_token_at = at
        self.last_token_at = at
        if finish == "stop" and not self.request.include_stop_str_in_output:
            self.completion_tokens += 1
        else:
            self._take(token)
        if finish is not None and not self.stops.stopped:
            self._scan(self.detokenizer.finish())
            self.text += self.stops.finish()
        return "stop" if self.stops.stopped else finish

    def score_prompt(self, first: int, scored: list[Scored]) -> None:
        """Take the scores of the prompt's tokens from position ``first`` on; some may come again."""
        self.scored_prompt.update(enumerate(scored, start=first))

    def cut(self) -> tuple[int, list[Token]] | None:
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
            chat=self.request.is_chat,
            request_id=self.entry.request_id,
            created=int(self.entry.accepted_at),
            model=self.request.model or self.entry.model,
            text=said.content[len(before.content) :],
            reason=_reason(reason, said) if reason else None,
            first=number == 0,
            calls=said.calls[len(before.calls) :],
            calls_before=len(before.calls),
            logprobs=self._logprobs(self.cuts[number], self.cuts[number + 1] if reason is None else self._end),
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
            chat=self.request.is_chat,
            request_id=self.entry.request_id,
            created=int(self.entry.accepted_at),
            model=self.request.model or self.entry.model,
            text=said.content,
            reason=_reason(reason, said),
            calls=said.calls,
            usage=Usage(
                prompt_tokens,
                self.completion_tokens,
                prompt_tokens + self.completion_tokens,
                PromptTokensDetails(self.cached_tokens),
            ),
            logprobs=self._logprobs(0, self._end),
            prompt_logprobs=self._prompt_logprobs(),
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

    def _take(self, token: Token) -> None:
        self.completion_tokens += 1
        self._uncut.append(token)
        if isinstance(token, Scored):
            self.scored.add(token, self._decoded)
        self._scan(self.detokenizer.push(token_id(token)))

    def _scan(self, text: str) -> None:
        self._decoded += len(text)
        self.text += self.stops.push(text, search=self.completion_tokens > self.request.min_tokens)

    @property
    def _end(self) -> int | None:
        """Tokens that begin at or after it are not part of the answer."""
        return len(self.text) if self.stops.stopped else None

    def _logprobs(self, start: int, end: int | None) -> TokenLogprobs | None:
        if self.request.num_logprobs is None:
            return None
        return self.scored.between(start, end, self.tokenizer)

    def _prompt_logprobs(self) -> PromptLogprobs | msgspec.UnsetType:
        if self.request.prompt_logprobs is None:
            return msgspec.UNSET
        return prompt_logprobs(self.entry.prompt, self.scored_prompt, self.tokenizer)

    def _close_piece(self) -> None:
        self._uncut = []
        self.cuts.append(len(self.text))


def _asked(entry: Entry) -> Request:
    assert isinstance(entry.request, Request)
    return entry.request


def _reason(reason: FinishReason, said: Said) -> FinishReason:
    return "tool_calls" if said.calls and reason == "stop" else reason
