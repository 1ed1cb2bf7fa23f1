"""Where the kinds of requests part: what is computed for each, and who makes an answer of it."""

from protocol.kinds import AnyRequest
from protocol.plan import WorkerInfo
from protocol.prefill import EmbeddingRequest, ScoreRequest
from scheduler.chat import Chat
from scheduler.core.sequence import Sequence
from scheduler.generation import Generation, check_fits, sequence_for
from scheduler.journal.entry import Entry
from scheduler.prefill import (
    EmbeddingPrefill,
    Prefill,
    ScorePrefill,
    embedding_prompt,
    prefills_for,
    score_prompt,
)
from scheduler.structure import check_grammar

#: An accepted request while it runs.
Run = Generation | Prefill


def prompt_of(request: AnyRequest, chat: Chat, info: WorkerInfo) -> tuple[list[int], list[int]]:
    """An entry's ``prompt`` and ``splits``, of a request that can be served. Raises BadRequest."""
    match request:
        case EmbeddingRequest():
            return embedding_prompt(request, chat, info)
        case ScoreRequest():
            return score_prompt(request, chat, info)
        case _:
            check_grammar(request)
            prompt = chat.prompt_tokens(request)
            check_fits(request, prompt, info)
            return prompt, []


def sequences_for(entry: Entry, chat: Chat, info: WorkerInfo) -> list[Sequence]:
    """What the batcher is to run for a request, from where it is; the first has the request's id. Raises BadRequest."""
    match entry.request:
        case EmbeddingRequest() | ScoreRequest():
            return prefills_for(entry, info)
        case _:
            return [sequence_for(entry, info, chat.backend)]


def run_of(entry: Entry, sequences: list[Sequence], chat: Chat, accepted_at: float) -> Run:
    """Who makes an answer of what comes of these sequences; ``accepted_at`` is on the engine's clock, in seconds."""
    lengths = {sequence.id: sequence.prompt_len for sequence in sequences}
    match entry.request:
        case EmbeddingRequest():
            return EmbeddingPrefill(entry=entry, accepted_at=accepted_at, lengths=lengths)
        case ScoreRequest():
            return ScorePrefill(entry=entry, accepted_at=accepted_at, lengths=lengths, tokenizer=chat.backend)
        case _:
            return Generation.of(entry, chat, accepted_at)
