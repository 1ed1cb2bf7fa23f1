"""Layers of which one takes what the one before gives, and which are computed together."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from workers.bridge import attending
from workers.packed_attention import observed
from workers.packed_layer import PackedLayer, step_at_once


class LinkedLayers(nn.ModuleList):
    """All layers of a model, computed along with the first one, which is all that a slice of them has in a step: passing by the
    others one by one takes 0.2 ms, out of cold caches."""

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice) and range(len(self))[index] == range(len(self)) and step_at_once() is not None:
            return (self._modules["0"],)
        return super().__getitem__(index)


def link_layers(module: PreTrainedModel) -> None:
    """Have layers computed together where one gets what the one before gave, and its embeddings, in a trial of two tokens."""
    layers = [layer for layer in module.modules() if isinstance(layer, PackedLayer)]
    if not layers:
        return
    calls: list[tuple[PackedLayer, Tensor, object, Tensor]] = []

    def hear(layer: PackedLayer, given: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
        x = given[0] if given else named["hidden_states"]
        calls.append((layer, x, named.get("position_embeddings"), output))

    hooks = [layer.register_forward_hook(hear, with_kwargs=True) for layer in layers]
    with observed(layers[0].self_attn):
        module(input_ids=torch.zeros(1, 2, dtype=torch.int64), use_cache=False)
    for hook in hooks:
        hook.remove()
    if [layer for layer, *_ in calls] != layers:
        return
    for (before, _, turned, output), (after, x, turned_too, _) in pairwise(calls):
        if x is output and turned is turned_too is not None:
            before.link(after)
    if layers[0].linked == tuple(layers):
        _gather(module, layers)
    layers[-1].ends = _ends(module, layers[-1])


def _gather(module: nn.Module, layers: list[PackedLayer]) -> None:
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.ModuleList) and list(child) == layers:
                setattr(parent, name, LinkedLayers(layers))


def _ends(module: PreTrainedModel, layer: PackedLayer) -> bool:
    """Whether the second of two tokens has the same logits whatever the layer gives for the first."""

    def attend(_: int, query: Tensor, __: Tensor, value: Tensor, ___: object) -> Tensor:
        return value.cumsum(dim=0).repeat_interleave(query.shape[1] // value.shape[1], dim=1)

    def logits() -> Tensor:
        out: Tensor = module(input_ids=torch.zeros(1, 2, dtype=torch.int64), use_cache=False).logits[0, 1]
        return out

    def disturb(_: nn.Module, __: object, output: Tensor) -> Tensor:
        noise = torch.randn(output[:, :1].shape, generator=torch.Generator().manual_seed(0))
        return torch.cat([noise, output[:, 1:]], dim=1)

    with attending(attend):
        expected = logits()
        hook = layer.register_forward_hook(disturb)
        found = logits()
    hook.remove()
    return torch.equal(found, expected)
