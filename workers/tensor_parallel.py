"""A rank's share of a model, cut by the tensor-parallel plan that transformers has for it.

A plan names layers and how each is cut (Shoeybi et al., "Megatron-LM", 2019): by its outputs, so that a rank has heads, or
columns of an MLP, of its own; or by its inputs, so that each rank computes a summand. We read the plan and cut torch's own
layers, so that packing, paged attention and whatever else knows those layers needn't know of this
(docs/decisions/0016-tensor-parallel.md).
"""

import re
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

from workers import selftest
from workers.model import Model, ModelRefused, adopt
from workers.ranks import Ranks


class Summed(nn.Module):
    """A layer of which each rank computes a summand."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *inputs: Tensor) -> Tensor:
        summand: Tensor = self.layer(*inputs)
        dist.all_reduce(summand)
        return summand


class Gathered(nn.Module):
    """A layer of which each rank computes as many of the ``width`` outputs; the last ones may be padding."""

    def __init__(self, layer: nn.Module, width: int, count: int) -> None:
        super().__init__()
        self.layer, self._width, self._count = layer, width, count

    def forward(self, x: Tensor) -> Tensor:
        part: Tensor = self.layer(x)
        parts = [torch.empty_like(part) for _ in range(self._count)]
        dist.all_gather(parts, part)
        return torch.cat(parts, dim=-1)[..., : self._width]


class Part(nn.Module):
    """This rank's part of an input that all of them have."""

    def __init__(self, ranks: Ranks) -> None:
        super().__init__()
        self._ranks = ranks

    def forward(self, x: Tensor) -> Tensor:
        return x.tensor_split(self._ranks.count, -1)[self._ranks.index]


class EmbeddingPart(nn.Module):
    """The tokens from ``first`` on that this rank has the embeddings of; 0 for all others."""

    def __init__(self, embedding: nn.Embedding, first: int) -> None:
        super().__init__()
        self.embedding, self._first = embedding, first

    def forward(self, ids: Tensor) -> Tensor:
        own = ids - self._first
        others = (own < 0) | (own >= self.embedding.num_embeddings)
        embedded: Tensor = self.embedding(own.masked_fill(others, 0))
        return embedded.masked_fill(others[..., None], 0)


def check(model: Model, ranks: Ranks) -> None:
    """Raises ModelRefused for a model that so many ranks can't share."""
    module, config = model.module, model.module.config.get_text_config()
    kind = config.model_type
    if not any("*" in rule for rule in module.tp_plan):
        raise ModelRefused(
            f"{kind}: transformers has no tensor-parallel plan for it, so model.tensor_parallel must be 1"
        )
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, name, None) or ranks.count
        if heads % ranks.count:
            raise ModelRefused(f"{kind}: {name} = {heads} must be a multiple of model.tensor_parallel = {ranks.count}")
    for name, style in _planned(module).items():
        part = attrgetter(name)(module)
        if _way(style, part) is None:
            raise ModelRefused(f"{kind}: its tensor-parallel plan says {style!r} of {name}, a {type(part).__name__}")


def share(whole: Model, ranks: Ranks, device: torch.device) -> Model:
    """What this rank keeps of a model that passed the `check`, whose module is cut in place. All ranks must do this at once.

    Raises ModelRefused when the ranks together don't compute what the whole model did.
    """
    expected = selftest.expect(whole)
    cut(whole.module, ranks)
    module: Any = whole.module
    model = adopt(module.to(device), whole.path, whole.max_model_len)
    selftest.compare(model, selftest.expect(model), expected, "of its shares", "its tensor-parallel plan must be wrong")
    return model


def agree(tokens: Tensor) -> None:
    """Let what rank 0 drew hold: were sums rounded in another way, the ranks would go on from different texts."""
    dist.broadcast(tokens, src=0)


@torch.no_grad()
def cut(module: PreTrainedModel, ranks: Ranks) -> None:
    """Keep this rank's share of every layer and weight that the plan names; `check` says whether that can be done."""
    # From the inside out, for a name leads nowhere once what is around it has been wrapped.
    for name, style in reversed(_planned(module).items()):
        owner, _, own = name.rpartition(".")
        parent = module.get_submodule(owner)
        part = getattr(parent, own)
        way = _way(style, part)
        assert way is not None, "checked"
        setattr(parent, own, way(part, ranks))


def _planned(module: PreTrainedModel) -> dict[str, str]:
    """The styles of the layers and weights that the plan names; it numbers no layers."""
    plan = module.tp_plan
    names = [name for name, _ in (*module.named_modules(), *module.named_parameters())]
    rules = {name: re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names}
    return {name: plan[rule] for name, rule in rules.items() if rule in plan}


def _way(style: str, part: nn.Module | nn.Parameter) -> Callable[[Any, Ranks], nn.Module | nn.Parameter] | None:
    """How such a part is cut in this style, if that is known."""
    return next((way for kind, way in _WAYS.get(style, ()) if isinstance(part, kind)), None)


def _own(weight: Tensor, dim: int, ranks: Ranks) -> nn.Parameter:
    """A copy, for what the others have needn't stay in memory."""
    return nn.Parameter(weight.tensor_split(ranks.count, dim)[ranks.index].clone(), requires_grad=False)


def _by_outputs(linear: nn.Linear, ranks: Ranks) -> nn.Linear:
    linear.weight = _own(linear.weight, 0, ranks)
    if linear.bias is not None:
        linear.bias = _own(linear.bias, 0, ranks)
    linear.out_features = len(linear.weight)
    return linear


def _by_inputs(linear: nn.Linear, ranks: Ranks) -> nn.Module:
    linear.weight = _own(linear.weight, 1, ranks)
    linear.in_features = linear.weight.shape[1]
    if ranks.index:
        # It is to be in the sum once.
        linear.register_parameter("bias", None)
    return Summed(linear)


def _by_whole_inputs(linear: nn.Linear, ranks: Ranks) -> nn.Module:
    return nn.Sequential(Part(ranks), _by_inputs(linear, ranks))


def _gathered(linear: nn.Linear, ranks: Ranks) -> nn.Module:
    width = linear.out_features
    padding = -width % ranks.count
    linear.weight = nn.Parameter(pad(linear.weight, (0, 0, 0, padding)))
    if linear.bias is not None:
        linear.bias = nn.Parameter(pad(linear.bias, (0, padding)))
    return Gathered(_by_outputs(linear, ranks), width, ranks.count)


def _embedding(embedding: nn.Embedding, ranks: Ranks) -> nn.Module:
    tokens = torch.arange(embedding.num_embeddings).tensor_split(ranks.count)[ranks.index]
    embedding.weight = _own(embedding.weight, 0, ranks)
    embedding.num_embeddings = len(tokens)
    embedding.padding_idx = None
    return Summed(EmbeddingPart(embedding, int(tokens[0])))


def _halves(weight: nn.Parameter, ranks: Ranks) -> nn.Parameter:
    """By outputs, of two weights that lie one after the other."""
    return nn.Parameter(torch.cat([_own(half, -2, ranks) for half in weight.chunk(2, -2)], -2), requires_grad=False)


#: By style, what kind of part may be cut in it, and how. Experts' weights are ``[expert, outputs, inputs]``.
_WAYS: dict[str, tuple[tuple[type, Callable[[Any, Ranks], nn.Module | nn.Parameter]], ...]] = {
    "colwise": ((nn.Linear, _by_outputs),),
    "rowwise": ((nn.Linear, _by_inputs), (nn.Parameter, lambda weight, ranks: _own(weight, -1, ranks))),
    "colwise_gather_output": ((nn.Linear, _gathered),),
    "rowwise_split_input": ((nn.Linear, _by_whole_inputs),),
    "embedding_rowwise": ((nn.Embedding, _embedding),),
    "packed_colwise": ((nn.Parameter, _halves),),
    "moe_tp_experts": ((nn.Module, lambda experts, _: Summed(experts)),),
    "replicated_with_grad_allreduce": ((nn.Module, lambda layer, _: layer),),
}
