"""The contract between scheduler and worker: plain ints over a pipe, no tensors.

Frames are a 4-byte big-endian length and a msgpack body. The scheduler writes one `WorkerConfig`, then `StepPlan`s; the
worker answers one `WorkerInfo` when it is ready, then one `StepResult` or `StepFailure` per plan, in order. An idle worker is
asked for a `Pong` now and then. A worker that can't start sends one `StartFailure` and exits.

Plans may be sent ahead of answers. Those that follow one that failed were made as if it had passed, so from a `StepFailure` on
the worker skips plans, without an answer, until a `Resume`.

The worker keeps one *slot* per running sequence: its tokens, those it has sampled included, how many of them are computed, its
block table and its sampling parameters. A plan sends only what changed.
"""

import struct
from typing import Literal

import msgspec

_LENGTH = struct.Struct(">I")


AttentionName = Literal["auto", "reference", "cpu", "cuda"]
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
WeightsName = Literal["auto", "plain", "float32", "bfloat16", "int8"]
KVDtypeName = Literal["auto", "float16"]
ExecutionName = Literal["auto", "eager", "graphs"]


#: What is made of a prompt's hidden states: their mean, or the last one.
Pooling = Literal["mean", "last"]

#: How a worker drafts that has no draft model.
NGRAM = "ngram"


class WorkerConfig(msgspec.Struct, frozen=True):
    """What a worker is to serve and how. ``num_blocks`` absent: as many as ``kv_memory_mb`` MiB hold. ``adapters``: directories
    of LoRA adapters by name, ``max_adapters`` of which are in memory at a time. ``speculation``: how it drafts, `NGRAM` or the
    directory of a draft model, if it does. ``batch_invariant``: nothing computed may depend, in any bit, on who shares a step.
    ``tensor_parallel``: processes that share the model; memory is each one's. ``execution``: whether decodes are replayed from
    graphs, which takes CUDA.
    """

    model: str
    dtype: DtypeName
    device: str
    attention: AttentionName
    threads: int | None
    block_size: int
    num_blocks: int | None
    kv_memory_mb: int
    max_running: int
    max_batch_tokens: int
    max_model_len: int | None
    weights: WeightsName = "auto"
    kv_dtype: KVDtypeName = "auto"
    adapters: dict[str, str] = {}
    max_adapters: int = 0
    speculation: str | None = None
    batch_invariant: bool = False
    tensor_parallel: int = 1
    execution: ExecutionName = "auto"


#: Comes instead of a token that can't be sampled: the grammar of its sequence can't be followed any further.
NO_TOKEN = -1


class Sampling(msgspec.Struct, frozen=True, array_like=True):
    """How one sequence's tokens are drawn; at its default, each of these is off. ``temperature`` 0 is greedy.

    Before the output has ``min_tokens`` none of ``stop_ids`` is drawn. ``bad_words`` are token sequences that are never
    completed. ``logprobs`` and ``prompt_logprobs``: each token of the output, or the prompt, is scored and so many of the
    likeliest in its place are told; None: not at all. Of the prompt that begins at position ``score_from``, which is 1 at least.
    ``grammar``: what the output must follow, in llguidance's notation. ``pooling``: what is wanted of the prompt's hidden states,
    if anything. All token ids must be in the vocabulary.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    stop_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: str | None = None
    score_from: int = 1
    pooling: Pooling | None = None


#: Of these a model may have defaults of its own.
MODEL_DEFAULTS = ("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty")


class Scored(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A token and how the model itself, before any sampling parameter, rated it in its place: natural log probability, never
    infinite; rank, from 1; the likeliest tokens there with their log probabilities, best first."""

    token: int
    logprob: float
    rank: int
    top: list[tuple[int, float]]


class Admission(msgspec.Struct, frozen=True, array_like=True):
    """A slot is given to a sequence with these tokens, the first ``prompt_len`` of them its prompt: whatever it held before is
    forgotten. ``adapter``: the name of a LoRA adapter that its tokens go through, or nothing.
    """

    slot: int
    tokens: list[int]
    sampling: Sampling
    prompt_len: int
    adapter: str = ""


class Row(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One sequence's part of a step: positions ``start .. start + length - 1`` are computed.

    ``new_blocks`` are appended to the slot's block table before the step. With ``sample`` the logits of the last position
    draw a token, for position ``start + length``.
    """

    slot: int
    start: int
    length: int
    new_blocks: list[int]
    sample: bool


class Verification(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A decode of which the worker may guess the next tokens: with the slot's last token at most ``drafts`` drafted ones are
    computed, wherever the slot stands by then. ``new_blocks`` as in a `Row`; there are blocks for all of them."""

    slot: int
    drafts: int
    new_blocks: list[int]


class Work(msgspec.Struct, frozen=True):
    """How much a step computes: ``tokens`` in ``rows``; ``context`` positions whose KV is read, each row's once; ``attended``
    pairs of a token and a position that it sees."""

    rows: int
    tokens: int
    context: int
    attended: int


class StepPlan(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """``decodes`` are slots that compute their last token, the one after all that is computed, and sample the next: most of a
    step, so nothing more is said of them. ``verifications`` are those that speculate; ``rows`` are all others. Before anything is
    computed ``copies`` are made, of the whole KV of one block each: from where, and to where, all read before any is written.

    After a `StepFailure` the scheduler sends an `Admission` for every sequence of that step again.
    """

    step: int
    admissions: list[Admission]
    decodes: list[int]
    rows: list[Row]
    verifications: list[Verification] = []
    copies: list[tuple[int, int]] = []

    @property
    def num_sampled(self) -> int:
        return len(self.decodes) + sum(row.sample for row in self.rows)


class Resume(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The failure is known; the plans from here on take it into account."""


class Ping(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Are you there?"""


class Verdict(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What came of a `Verification`: of so many ``drafted`` tokens the accepted ones, and the one sampled after them."""

    drafted: int
    tokens: list[int]

    @property
    def accepted(self) -> int:
        return len(self.tokens) - 1


class StepResult(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """``tokens``: one id for each of the ``decodes``, then for each row with ``sample``; ``verdicts``: one for each of the
    ``verifications``. ``seconds``: the worker's own time for the step; ``waited_s``: from the end of the step before until it
    had the plan, whether there was work or not.

    ``scored``: of the ``tokens``, by index, those that are to be. ``prompts``: by index of a row, prompt tokens that are to be
    scored, in order: from the one after the row's first on, or from its ``score_from`` on. ``pooled``: by index of a row, float64
    ``[hidden_size]`` in the machine's byte order: the sum of its hidden states, or the last one once the prompt ends in it.
    """

    step: int
    tokens: list[int]
    seconds: float
    waited_s: float = 0.0
    scored: dict[int, Scored] = {}
    prompts: dict[int, list[Scored]] = {}
    pooled: dict[int, bytes] = {}
    verdicts: list[Verdict] = []


class StepFailure(msgspec.Struct, frozen=True, tag=True):
    step: int
    error: str


class Pong(msgspec.Struct, frozen=True, tag=True):
    pass


class StartFailure(msgspec.Struct, frozen=True, tag=True):
    error: str


class WorkerInfo(msgspec.Struct, frozen=True, tag=True):
    """What a ready worker serves. ``model_path`` holds tokenizer files; sizes are in tokens unless named otherwise. ``sampling``:
    how the model's tokens are drawn when a request says nothing."""

    model_path: str
    max_model_len: int
    vocab_size: int
    hidden_size: int
    eos_ids: list[int]
    num_blocks: int
    block_size: int
    kv_bytes_per_block: int
    device: str
    dtype: str
    kv_dtype: str
    attention: str
    sampling: Sampling = Sampling(temperature=1.0)
    adapters: list[str] = []


Command = StepPlan | Resume | Ping
Reply = WorkerInfo | StepResult | StepFailure | Pong | StartFailure

encode = msgspec.msgpack.Encoder().encode
decode_config = msgspec.msgpack.Decoder(WorkerConfig).decode
decode_command = msgspec.msgpack.Decoder(Command).decode
decode_reply = msgspec.msgpack.Decoder(Reply).decode

#: Bytes before each frame's body.
HEADER_BYTES = _LENGTH.size


def frame(message: WorkerConfig | Command | Reply) -> bytes:
    return frame_of(encode(message))


def frame_of(body: bytes) -> bytes:
    return _LENGTH.pack(len(body)) + body


def body_length(header: bytes) -> int:
    (length,) = _LENGTH.unpack(header)
    return int(length)
