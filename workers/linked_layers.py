"""Layers of which one takes what the one before gives, and which are computed together."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

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
    if list(layers[0].linked()) == layers:
        _gather(module, layers)


def _gather(module: nn.Module, layers: list[PackedLayer]) -> None:
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.ModuleList) and list(child) == layers:
                setattr(parent, name, LinkedLayers(layers))
