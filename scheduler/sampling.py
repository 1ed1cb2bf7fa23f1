"""How a request's tokens are drawn: what it asks for, and what the model's own defaults say where it asks for nothing."""

import hashlib
from typing import TYPE_CHECKING

import msgspec

from protocol.errors import BadRequest
from protocol.plan import MODEL_DEFAULTS, Sampling, WorkerInfo
from protocol.request import Request
from scheduler.structure import grammar_for, structure_field

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def check_sampling(request: Request, room: int, info: WorkerInfo) -> None:
    """Raises BadRequest for unknown tokens, for more of them than the ``room`` that the prompt leaves, or for a structure that
    this model can't end."""
    if request.min_tokens > room:
        raise BadRequest("min_tokens", f"must be at most {room}, which is what the prompt leaves of the context")
    unknown = next((token for token in request.logit_bias or () if int(token) >= info.vocab_size), None)
    if unknown is not None:
        raise BadRequest("logit_bias", f"{unknown} is no token id: those are below {info.vocab_size}")
    if request.is_constrained and not info.eos_ids:
        raise BadRequest(structure_field(request), "this model has no token that ends a text")


def stop_ids_of(request: Request, info: WorkerInfo) -> frozenset[int]:
    """The tokens that end it."""
    return frozenset(request.stop_token_ids or ()) | frozenset(() if request.ignore_eos else info.eos_ids)


def sampling_of(request: Request, seed: int, info: WorkerInfo, tokenizer: "Tokenizer") -> Sampling:
    """All token ids in it are in the vocabulary."""
    given = {name: value for name in MODEL_DEFAULTS if (value := getattr(request, name)) is not None}
    stop_ids = stop_ids_of(request, info) if request.min_tokens else ()
    return msgspec.structs.replace(
        info.sampling,
        **given,
        seed=seed,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        logit_bias=tuple((int(token), bias) for token, bias in (request.logit_bias or {}).items()),
        min_tokens=request.min_tokens,
        stop_ids=tuple(sorted(token for token in stop_ids if token < info.vocab_size)),
        bad_words=_token_sequences(request.bad_words or [], info.vocab_size, tokenizer),
        logprobs=_num_logprobs(request),
        prompt_logprobs=request.prompt_logprobs,
        grammar=grammar_for(request),
    )


def seed_of(seed: int, index: int) -> int:
    """What a choice's tokens are drawn with: the first one's with the request's seed, the others' with the first eight bytes of
    SHA-256 of ``seed:index``, as a signed number, so that neither a request nor a choice repeats another's draws."""
    if not index:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed}:{index}".encode()).digest()[:8], signed=True)


def _num_logprobs(request: Request) -> int | None:
    """What is asked for; at least each token's own where answers are compared."""
    if request.num_logprobs is None and request.num_choices > request.n:
        return 0
    return request.num_logprobs


def _token_sequences(words: list[str], vocab_size: int, tokenizer: "Tokenizer") -> tuple[tuple[int, ...], ...]:
    """The tokens of each word by itself and after a space, as vLLM does; what the model can't generate needs no ban."""
    texts = [text for word in words for text in (word, f" {word.lstrip()}")]
    encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
    sequences = dict.fromkeys(tuple(encoding.ids) for encoding in encodings)
    return tuple(sequence for sequence in sequences if sequence and max(sequence) < vocab_size)
