"""One accepted request while it runs: what its tenant asked for, what it was told so far, and what it is told at the end."""

import secrets
import time
from dataclasses import dataclass, field

from protocol import openai, replies
from protocol.errors import BadRequest
from protocol.openai import FinishReason, Usage
from protocol.plan import Sampling, WorkerInfo
from protocol.request import Request
from scheduler.core.sequence import Sequence
from scheduler.text import Detokenizer, StopStrings, Text


def sequence_for(id: str, request: Request, prompt: list[int], info: WorkerInfo) -> Sequence:
    """What the batcher is to run for a request. Raises BadRequest for unknown tokens or too many of them."""
    if not prompt:
        raise BadRequest("prompt", "must hold at least one token")
    # One unknown id would fail the forward pass of everyone in its batch.
    unknown = next((index for index, token in enumerate(prompt) if token >= info.vocab_size), None)
    if unknown is not None:
        raise BadRequest(f"prompt[{unknown}]", f"must be a token id below {info.vocab_size}")
    room = info.max_model_len - len(prompt)
    wanted = request.output_limit
    if room < 1 or (wanted is not None and wanted > room):
        asked = f"{len(prompt)} prompt tokens" + ("" if wanted is None else f" and max_tokens = {wanted}")
        raise BadRequest(
            "messages" if request.is_chat else "prompt",
            f"{asked} are over the context of {info.max_model_len} tokens",
            "context_length_exceeded",
        )
    stop_ids = frozenset(request.stop_token_ids or ()) | frozenset(() if request.ignore_eos else info.eos_ids)
    return Sequence(id, prompt, max_tokens=wanted or room, stop_ids=stop_ids, sampling=sampling_for(request))


def sampling_for(request: Request) -> Sampling:
    """Defaults as in the OpenAI API: temperature 1, everything kept; a request without a seed gets one."""
    return Sampling(
        temperature=1.0 if request.temperature is None else request.temperature,
        top_k=max(request.top_k or 0, 0),
        top_p=1.0 if request.top_p is None else request.top_p,
        min_p=request.min_p or 0.0,
        seed=secrets.randbits(63) if request.seed is None else request.seed,
    )


@dataclass(slots=True)
class Generation:
    """Text comes in token by token and goes out in pieces; times are on the engine's clock, in seconds."""

    tenant: str
    request_id: str
    model: str
    topic: str
    correlation: bytes | None
    chat: bool
    streams: bool
    prompt_tokens: int
    accepted_at: float
    detokenizer: Detokenizer
    stops: StopStrings
    created: int = field(default_factory=lambda: int(time.time()))
    started_at: float | None = None
    first_token_at: float | None = None
    last_token_at: float | None = None
    completion_tokens: int = 0
    text: str = ""
    published: int = 0
    chunks: int = 0

    @classmethod
    def of(
        cls,
        sequence: Sequence,
        request: Request,
        text: Text,
        *,
        at: float,
        model: str,
        topic: str,
        correlation: bytes | None,
    ) -> "Generation":
        """The generation of a sequence whose id is ``tenant/request_id``."""
        tenant, request_id = sequence.id.split("/")
        return cls(
            tenant=tenant,
            request_id=request_id,
            model=model,
            topic=topic,
            correlation=correlation,
            chat=request.is_chat,
            streams=request.stream,
            prompt_tokens=sequence.prompt_len,
            accepted_at=at,
            detokenizer=Detokenizer(text.backend, sequence.tokens),
            stops=StopStrings(request.stop_strings),
        )

    def push(self, token: int, at: float, finish: FinishReason | None) -> FinishReason | None:
        """Take one token; says why the generation ends, which a stop string may decide before the batcher does."""
        self.completion_tokens += 1
        self.first_token_at = at if self.first_token_at is None else self.first_token_at
        self.last_token_at = at
        if finish != "stop":  # a token that stops the sequence is not part of the text
            self.text += self.stops.push(self.detokenizer.push(token))
        if finish is not None and not self.stops.stopped:
            self.text += self.stops.push(self.detokenizer.finish())
            self.text += self.stops.finish()
        return "stop" if self.stops.stopped else finish

    def next_chunk(self, reason: FinishReason | None = None) -> replies.Chunk | None:
        """What isn't published yet, as the next numbered chunk; None when there is nothing to say."""
        text = self.text[self.published :]
        if not text and reason is None:
            return None
        data = openai.piece(
            chat=self.chat,
            request_id=self.request_id,
            created=self.created,
            model=self.model,
            text=text,
            reason=reason,
            first=self.chunks == 0,
        )
        chunk = replies.Chunk(self.request_id, self.chunks, data)
        self.published = len(self.text)
        self.chunks += 1
        return chunk

    def result(self, reason: FinishReason, at: float) -> replies.Result:
        usage = Usage(self.prompt_tokens, self.completion_tokens, self.prompt_tokens + self.completion_tokens)
        data = openai.answer(
            chat=self.chat,
            request_id=self.request_id,
            created=self.created,
            model=self.model,
            text=self.text,
            reason=reason,
            usage=usage,
        )
        return replies.Result(self.request_id, data, self.timings(at), self.chunks)

    def timings(self, at: float) -> replies.Timings:
        started = self.started_at if self.started_at is not None else at
        first = self.first_token_at
        return replies.Timings(
            queued_s=started - self.accepted_at,
            ttft_s=None if first is None else first - self.accepted_at,
            total_s=at - self.accepted_at,
        )
