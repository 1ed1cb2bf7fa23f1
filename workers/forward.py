"""One forward pass of a model over a ragged batch."""

from torch import Tensor
from transformers import PreTrainedModel

from workers.attention import AttentionBackend
from workers.bridge import PagedStep, attending
from workers.slots import Inputs


def forward(
    module: PreTrainedModel,
    backend: AttentionBackend,
    inputs: Inputs,
    keep: Tensor | None = None,
    *,
    whole: bool = True,
) -> Tensor:
    """Logits ``[len(keep), V]`` of the batch's tokens at ``keep``, int64 ``[n]``, ascending, or of all of them. Unless ``whole``,
    what a `HiddenStates` hears of the others may be anything."""
    with attending(PagedStep(backend, inputs.batch, None if whole else keep)):
        output = module(
            input_ids=inputs.ids[None],
            position_ids=inputs.positions[None],
            attention_mask=None,
            use_cache=False,
            logits_to_keep=0 if keep is None else keep,
        )
    logits: Tensor = output.logits[0]
    return logits
