"""Proof at load time that a model gives the same logits in our ragged paged batches as in a plain forward pass.

A model may hold state we don't know of, or read its attention's inputs in a way we don't honour. Rather than keep a list
of such models, three sequences are computed in chunks that mix prefill with decode, over blocks out of order, and compared.
Where batches are to make no difference at all, they are computed in several more ways, and compared bit for bit.
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from protocol.plan import Admission, Row, Sampling, StepPlan
from workers.attention import AttentionBackend
from workers.bridge import NAME
from workers.forward import forward
from workers.model import Model, ModelRefused
from workers.slots import Slots

#: How each sequence is cut into steps; a 0 sits a step out.
Chunks = Sequence[Sequence[int]]
_CHUNKS: Chunks = ((10, 1, 7, 1, 4), (0, 9, 1, 1, 1), (3, 0, 8, 5, 1))

#: Norm of the difference over the norm of the logits, by what numbers are rounded to. Rounding alone gives about 1e-6 in
#: float32, 1e-2 in bfloat16; in int8 a last bit of float32 may move an input by a whole step, and layer by layer that grows to
#: a few 1e-2.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2, torch.int8: 0.3}


@torch.inference_mode()
def expect(model: Model) -> list[Tensor]:
    """The logits that `check` wants to see again: those of plain forward passes, float32 on the CPU."""
    model.module.set_attn_implementation("eager")
    try:
        return [_told(model.module(input_ids=prompt[None], use_cache=False).logits[0]) for prompt in _prompts(model)]
    finally:
        model.module.set_attn_implementation(NAME)


@torch.inference_mode()
def check(
    model: Model,
    backend: type[AttentionBackend],
    block_size: int,
    expected: list[Tensor],
    rounding: torch.dtype | None = None,
) -> None:
    """Raises ModelRefused with the size of the difference when the two ways disagree; ``rounding``: what activations are rounded
    to, if not to the model's dtype."""
    ragged = _ragged(model, backend, block_size, _prompts(model), _CHUNKS)
    roundings = {model.kv_dtype, rounding or model.dtype}
    compare(model, ragged, expected, "of a ragged batch", "it must hold state that isn't paged", roundings)


def compare(
    model: Model,
    logits: list[Tensor],
    expected: list[Tensor],
    of: str,
    reason: str,
    rounding: Collection[torch.dtype] = (),
) -> None:
    """Raises ModelRefused when logits ``of`` something are further from what is expected than rounding can explain.

    ``rounding``: to what numbers are rounded on the way, besides the model's dtype.
    """
    error = max(float((ours - plain).norm() / plain.norm()) for ours, plain in zip(logits, expected, strict=True))
    tolerance = max(_TOLERANCE[dtype] for dtype in (model.dtype, *rounding))
    if not error <= tolerance:
        raise ModelRefused(
            f"{model.module.config.model_type}: logits {of} differ from a plain forward by {error:.1e} "
            f"of their norm (at most {tolerance:.0e} is rounding): {reason}"
        )


def _told(logits: Tensor) -> Tensor:
    return logits.float().cpu()


@torch.inference_mode()
def check_invariant(model: Model, backend: type[AttentionBackend], block_size: int, max_batch_tokens: int) -> None:
    """Raises ModelRefused when a token's logits depend, in any bit, on who shares its step, or on how its sequence is cut."""
    prompts = _prompts(model, max_batch_tokens)

    def ragged(prompts: list[Tensor], chunks: Chunks) -> list[Tensor]:
        return _ragged(model, backend, block_size, prompts, chunks)

    alone = [ragged([prompt], [[len(prompt)]])[0] for prompt in prompts]
    together = ragged(prompts, [[len(prompt)] for prompt in prompts])
    cut = ragged(prompts[: len(_CHUNKS)], _CHUNKS)
    one_by_one = ragged(prompts[1:2], [[1] * len(prompts[1])])
    others = zip([*alone, *alone[: len(_CHUNKS)], alone[1]], [*together, *cut, *one_by_one], strict=True)
    differing = [(ours != theirs).any(dim=-1).float().mean() for ours, theirs in others]
    if any(differing):
        raise ModelRefused(
            f"{model.module.config.model_type}: the logits of up to {max(differing):.0%} of a sequence's tokens depend on who "
            "shares their step, if only in the last bit: it can't be served with batch_invariant"
        )


def _prompts(model: Model, total: int = 0) -> list[Tensor]:
    """One for each of the `_CHUNKS`, and another one if all are to have so many tokens."""
    generator = torch.Generator().manual_seed(0)
    lengths = [sum(chunks) for chunks in _CHUNKS]
    rest = min(total - sum(lengths), model.max_model_len)
    prompts = [
        torch.randint(0, model.vocab_size, (length,), generator=generator)
        for length in [*lengths, *([rest] if rest > 0 else [])]
    ]
    return [prompt.to(model.device) for prompt in prompts]


def _ragged(
    model: Model,
    backend_class: type[AttentionBackend],
    block_size: int,
    prompts: list[Tensor],
    chunks: Chunks,
) -> list[Tensor]:
    """Logits of every token, when the prompts are cut into steps so."""
    per_sequence = -(-max(len(prompt) for prompt in prompts) // block_size)
    total = per_sequence * len(prompts)
    backend = backend_class(model.layers, total, block_size, model.dtype, model.device, model.kv_dtype)
    slots = Slots(len(prompts), per_sequence, block_size, model.device)
    for slot, prompt in enumerate(prompts):
        slots.admit(Admission(slot, prompt.tolist(), Sampling(), len(prompt)))
        # Blocks descending and interleaved between sequences: no two neighbours belong together.
        blocks = [total - 1 - slot - len(prompts) * index for index in range(per_sequence)]
        slots.extend([Row(slot, 0, 0, blocks, sample=False)])
    done = [0] * len(prompts)
    logits: list[list[Tensor]] = [[] for _ in prompts]
    for lengths in zip(*chunks, strict=True):
        rows = [Row(slot, done[slot], length, [], sample=True) for slot, length in enumerate(lengths) if length]
        inputs = slots.inputs(StepPlan(0, [], [], rows))
        out = _told(forward(model.module, backend, inputs))
        for row, piece in zip(rows, out.split([row.length for row in rows]), strict=True):
            logits[row.slot].append(piece)
            done[row.slot] += row.length
    return [torch.cat(pieces) for pieces in logits]
