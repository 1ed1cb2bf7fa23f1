"""Where the kinds of requests part: what is computed for each, and who makes an answer of it."""

from protocol.kinds import AnyRequest
from protocol.plan import WorkerInfo
from protocol.prefill import EmbeddingRequest, ScoreRequest
from scheduler.chat import Chat
from scheduler.core.sequence import Sequence
from scheduler.generation import Generation, check_adapter, check_fits, sequences_for
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


def run_of(entry: Entry, chat: Chat, info: WorkerInfo, accepted_at: float) -> tuple[Run, list[list[Sequence]]]:
    """Who makes an answer to a request, and what the batcher is to run for it, from where it is: together those with the same
    prompt. ``accepted_at`` is on the engine's clock, in seconds. Raises BadRequest for what this worker can't run."""
    check_adapter(entry.request.adapter, info)
    match entry.request:
        case EmbeddingRequest() | ScoreRequest():
            return _prefill_of(entry, chat, accepted_at)
        case _:
            check_fits(entry.request, entry.prompt, info)
            generation = Generation.of(entry, chat, accepted_at)
            return generation, [sequences_for(generation, info)]


def _prefill_of(entry: Entry, chat: Chat, accepted_at: float) -> tuple[Prefill, list[list[Sequence]]]:
    sequences = prefills_for(entry)
    lengths = {sequence.id: sequence.prompt_len for sequence in sequences}
    families = [[sequence] for sequence in sequences]
    if isinstance(entry.request, EmbeddingRequest):
        return EmbeddingPrefill(entry=entry, accepted_at=accepted_at, lengths=lengths), families
    return ScorePrefill(entry=entry, accepted_at=accepted_at, lengths=lengths, tokenizer=chat.backend), families
