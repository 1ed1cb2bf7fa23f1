"""Proof at load time that a model gives the same logits in our ragged paged batches as in a plain forward pass.

A model may hold state we don't know of, or read its attention's inputs in a way we don't honour. Rather than keep a list
of such models, three sequences are computed in chunks that mix prefill with decode, over blocks out of order, and compared.
"""

import torch
from torch import Tensor

from protocol.plan import Admission, Row, Sampling, StepPlan
from workers.attention import AttentionBackend
from workers.bridge import NAME
from workers.forward import forward
from workers.model import Model, ModelRefused
from workers.slots import Slots

#: How each sequence is cut into steps; a 0 sits a step out.
_CHUNKS = ((10, 1, 7, 1, 4), (0, 9, 1, 1, 1), (3, 0, 8, 5, 1))

#: Norm of the difference over the norm of the logits. Rounding alone gives about 1e-6 in float32, 1e-2 in bfloat16.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@torch.inference_mode()
def expect(model: Model) -> list[Tensor]:
    """The logits that `check` wants to see again: those of plain forward passes."""
    model.module.set_attn_implementation("eager")
    try:
        return [model.module(input_ids=prompt[None], use_cache=False).logits[0].float() for prompt in _prompts(model)]
    finally:
        model.module.set_attn_implementation(NAME)


@torch.inference_mode()
def check(model: Model, backend: type[AttentionBackend], block_size: int, expected: list[Tensor]) -> None:
    """Raises ModelRefused with the size of the difference when the two ways disagree."""
    ragged = _ragged(model, backend, block_size, _prompts(model))
    error = max(float((ours - plain).norm() / plain.norm()) for ours, plain in zip(ragged, expected, strict=True))
    if not error <= _TOLERANCE[model.dtype]:
        raise ModelRefused(
            f"{model.module.config.model_type}: logits of a ragged batch differ from a plain forward by {error:.1e} of "
            f"their norm (at most {_TOLERANCE[model.dtype]:.0e} is rounding): it must hold state that isn't paged"
        )


def _prompts(model: Model) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, model.vocab_size, (sum(chunks),), generator=generator) for chunks in _CHUNKS]
    return [prompt.to(model.device) for prompt in prompts]


def _ragged(
    model: Model, backend_class: type[AttentionBackend], block_size: int, prompts: list[Tensor]
) -> list[Tensor]:
    per_sequence = -(-max(len(prompt) for prompt in prompts) // block_size)
    total = per_sequence * len(prompts)
    backend = backend_class(model.layers, total, block_size, model.dtype, model.device)
    slots = Slots(len(prompts), per_sequence, block_size, model.device)
    for slot, prompt in enumerate(prompts):
        slots.admit(Admission(slot, prompt.tolist(), Sampling(), len(prompt)))
        # Blocks descending and interleaved between sequences: no two neighbours belong together.
        blocks = [total - 1 - slot - len(prompts) * index for index in range(per_sequence)]
        slots.extend([Row(slot, 0, 0, blocks, sample=False)])
    done = [0] * len(prompts)
    logits: list[list[Tensor]] = [[] for _ in prompts]
    for lengths in zip(*_CHUNKS, strict=True):
        rows = [Row(slot, done[slot], length, [], sample=True) for slot, length in enumerate(lengths) if length]
        inputs = slots.inputs(StepPlan(0, [], [], rows))
        out = forward(model.module, backend, inputs).float()
        for row, piece in zip(rows, out.split([row.length for row in rows]), strict=True):
            logits[row.slot].append(piece)
            done[row.slot] += row.length
    return [torch.cat(pieces) for pieces in logits]
