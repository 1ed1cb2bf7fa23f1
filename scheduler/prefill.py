"""A request that generates nothing: its texts are computed once, and told of are their hidden states or their tokens' scores."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from protocol import openai, replies
from protocol.errors import BadRequest, ServiceError
from protocol.openai import EmbeddingList, PromptTokensDetails, TextCompletion, Usage
from protocol.plan import Sampling, Scored, WorkerInfo
from protocol.prefill import EmbeddingRequest, ScoreRequest
from scheduler.chat import Chat
from scheduler.core.sequence import Sequence
from scheduler.generation import check_tokens, context_exceeded
from scheduler.journal.entry import Entry
from scheduler.logprobs import ScoredText
from scheduler.text import Detokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def embedding_prompt(request: EmbeddingRequest, chat: Chat, info: WorkerInfo) -> tuple[list[int], list[int]]:
    """Its texts' tokens, one after the other, and where each but the first begins. Raises BadRequest."""
    if request.dimensions not in (None, info.hidden_size):
        detail = (
            f"must be {info.hidden_size}, as many as this model has: it wasn't trained for what would be left of them"
        )
        raise BadRequest("dimensions", detail)
    prompt: list[int] = []
    splits: list[int] = []
    for number, text in enumerate(request.texts):
        tokens = chat.tokens(text)
        check_tokens("input" if len(request.texts) == 1 else f"input[{number}]", tokens, info)
        splits.append(len(prompt))
        prompt += tokens
        if len(tokens) > info.max_model_len:
            raise context_exceeded(request, tokens, f"the context of {info.max_model_len} tokens")
    return prompt, splits[1:]


def score_prompt(request: ScoreRequest, chat: Chat, info: WorkerInfo) -> tuple[list[int], list[int]]:
    """The tokens of context and text, and where the first one stands that is scored. Raises BadRequest."""
    prompt, first = chat.text_in_context(request.text, request.context)
    if first:
        check_tokens("context", prompt[:first], info)
    check_tokens("text", prompt[first:], info)
    if len(prompt) > info.max_model_len:
        raise context_exceeded(request, prompt, f"the context of {info.max_model_len} tokens")
    # Nothing comes before the first token that could make it likely.
    first = max(first, 1)
    if first >= len(prompt):
        raise BadRequest("text", "holds no token with another one before it, in it or in its context")
    return prompt, [first]


def prefills_for(entry: Entry) -> list[Sequence]:
    """What the batcher is to run: a sequence for each text."""
    request = entry.request
    if isinstance(request, ScoreRequest):
        sampling = Sampling(prompt_logprobs=request.logprobs, score_from=entry.splits[0])
        prompts = [entry.prompt]
    else:
        assert isinstance(request, EmbeddingRequest)
        sampling = Sampling(pooling=request.pooling)
        bounds = [0, *entry.splits, len(entry.prompt)]
        prompts = [entry.prompt[start:end] for start, end in pairwise(bounds)]
    return [
        Sequence(
            id,
            prompt,
            max_tokens=0,
            sampling=sampling,
            tenant=entry.tenant,
            priority=request.priority,
            deadline=inf if entry.expires_at is None else entry.expires_at,
            adapter=request.adapter,
        )
        for id, prompt in zip(entry.sequence_ids, prompts, strict=True)
    ]


@dataclass(slots=True, kw_only=True)
class Prefill(ABC):
    """One accepted request while it runs; times are on the engine's clock, in seconds. ``lengths``: of its sequences, by id.

    Nothing of it is journalled before its end: after a crash all of it is computed again.
    """

    #: What comes with tokens that are generated.
    completion_tokens: ClassVar[int] = 0
    first_token_at: ClassVar[float | None] = None
    has_spoken: ClassVar[bool] = False

    entry: Entry
    accepted_at: float
    lengths: dict[str, int]
    started_at: float | None = None
    cached_tokens: int = 0
    _computed: int = 0

    @property
    def is_whole(self) -> bool:
        """Whether all that it asks for is computed."""
        return self._computed == len(self.lengths)

    def complete(self) -> None:
        """One of its sequences has ended."""
        self._computed += 1

    def result(self, at: float) -> replies.Result:
        """When it is whole. Raises ServiceError."""
        tokens = len(self.entry.prompt)
        data = self._answer(Usage(tokens, 0, tokens, PromptTokensDetails(self.cached_tokens)))
        return replies.Result(self.entry.request_id, data, self.timings(at), 0, self.entry.attempt)

    def timings(self, at: float) -> replies.Timings:
        started = at if self.started_at is None else self.started_at
        return replies.Timings(started - self.accepted_at, None, at - self.accepted_at)

    @abstractmethod
    def _answer(self, usage: Usage) -> EmbeddingList | TextCompletion:
        """What its tenant is told."""


@dataclass(slots=True, kw_only=True)
class EmbeddingPrefill(Prefill):
    """A vector for each text, from its hidden states."""

    _pooled: dict[str, "np.ndarray"] = field(default_factory=dict)

    def pool(self, id: str, start: int, part: bytes) -> None:
        """Take what the worker made of a sequence's hidden states from position ``start`` on: of a mean, the sum. Whoever was
        preempted begins anew."""
        vector = np.frombuffer(part)
        goes_on = start and self._request.pooling == "mean"
        self._pooled[id] = self._pooled[id] + vector if goes_on else vector

    @property
    def _request(self) -> EmbeddingRequest:
        assert isinstance(self.entry.request, EmbeddingRequest)
        return self.entry.request

    def _answer(self, usage: Usage) -> EmbeddingList:
        request = self._request
        vectors = [self._vector(self._pooled[id], length) for id, length in self.lengths.items()]
        model = request.model or self.entry.model
        return openai.embedded(vectors, model=model, usage=usage, as_base64=request.encoding_format == "base64")

    def _vector(self, pooled: "np.ndarray", length: int) -> list[float]:
        request = self._request
        vector = pooled / length if request.pooling == "mean" else pooled
        if not np.isfinite(vector).all():
            raise ServiceError("internal", "the model's hidden states aren't finite numbers")
        if request.normalize:
            vector = vector / (np.linalg.norm(vector) or 1.0)
        numbers: list[float] = vector.astype(np.float32).tolist()
        return numbers


@dataclass(slots=True, kw_only=True)
class ScorePrefill(Prefill):
    """The log probability of each of a text's tokens."""

    tokenizer: "Tokenizer"
    _scored: dict[int, Scored] = field(default_factory=dict)

    def score_prompt(self, first: int, scored: list[Scored]) -> None:
        """Take the scores of the tokens from position ``first`` on; some may come again."""
        self._scored.update(enumerate(scored, start=first))

    def _answer(self, usage: Usage) -> TextCompletion:
        entry, prompt, first = self.entry, self.entry.prompt, self.entry.splits[0]
        detokenizer = Detokenizer(self.tokenizer, prompt[:first])
        scored, text = ScoredText(), ""
        for position in range(first, len(prompt)):
            scored.add(self._scored[position], len(text))
            text += detokenizer.push(prompt[position])
        return openai.scored(
            text + detokenizer.finish(),
            scored.between(0, None, self.tokenizer),
            request_id=entry.request_id,
            created=int(entry.accepted_at),
            model=entry.request.model or entry.model,
            usage=usage,
        )
