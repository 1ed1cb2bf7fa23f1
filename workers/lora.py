"""Low-rank adapters of PEFT (Hu et al., "LoRA", 2021) beside one base model: every row of a batch goes through its own, or none.

The adapters that are in memory lie stacked, so that a layer multiplies the rows that have one by all of them at once and
keeps, of each row, what is its own: two thin products more, however many adapters a batch holds (cf. Punica and S-LoRA,
MLSys'24).
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
#: What an adapter_config.json may not ask for, and the value that asks for nothing.
_REFUSED = {
    "use_dora": False,
    "bias": "none",
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "lora_bias": False,
    "trainable_token_indices": None,
    "layer_replication": None,
}


class AdapterRefused(Exception):
    """The adapter can't be served with this model; the text says why."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter on disk: its rank, what its products are scaled by, and the names of the layers that it changes."""

    name: str
    path: Path
    rank: int
    scale: float
    layers: frozenset[str]

    @classmethod
    def open(cls, name: str, path: Path) -> Adapter:
        """Raises AdapterRefused."""
        try:
            config = json.loads((path / "adapter_config.json").read_text())
            with safe_open(path / _FILE, "pt") as tensors:
                keys = [key.removeprefix(_PREFIX) for key in tensors.keys()]  # noqa: SIM118 - not a mapping
        except (OSError, ValueError) as error:
            raise AdapterRefused(f"adapter {name}: {path} holds no PEFT adapter: {error}") from None
        if config.get("peft_type") != "LORA":
            raise AdapterRefused(f"adapter {name} is of type {config.get('peft_type')}; only LORA is served")
        for setting, nothing in _REFUSED.items():
            if config.get(setting, nothing) not in (nothing, None):
                raise AdapterRefused(f"adapter {name}: {setting} = {config[setting]!r} isn't served")
        layers = {key.removesuffix(".lora_A.weight") for key in keys if key.endswith(".lora_A.weight")}
        if {f"{layer}.lora_{part}.weight" for layer in layers for part in "AB"} != set(keys):
            raise AdapterRefused(f"adapter {name}: {_FILE} holds more than pairs of lora_A and lora_B weights")
        rank = int(config["r"])
        scale = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
        return cls(name, path, rank, scale, frozenset(layers))

    def weights(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Of each layer A ``[rank, in]`` and B ``[out, rank]``, scaled."""
        with safe_open(self.path / _FILE, "pt") as tensors:
            return {
                layer: (
                    tensors.get_tensor(f"{_PREFIX}{layer}.lora_A.weight"),
                    tensors.get_tensor(f"{_PREFIX}{layer}.lora_B.weight") * self.scale,
                )
                for layer in self.layers
            }


@dataclass(slots=True)
class _Share:
    """Of the step under way: ``tokens`` int64 ``[n]``, which of its tokens have an adapter; ``own`` ``[n, places * rank]``, 1
    where a column of the stacked product is of the token's own adapter, else 0. None: nobody has one."""

    tokens: Tensor | None = None
    own: Tensor = field(default_factory=lambda: torch.empty(0))


class AdaptedLinear(nn.Module):
    """A linear layer, and what adapters add to it. ``base`` may be replaced by another form of itself."""

    def __init__(self, base: nn.Linear, columns: int, share: _Share) -> None:
        """``columns``: places for adapters, times their rank."""
        super().__init__()
        self.base = base
        self.in_features, self.out_features = base.in_features, base.out_features
        like: Any = {"dtype": base.weight.dtype, "device": base.weight.device}
        self.down = nn.Parameter(torch.zeros(columns, base.in_features, **like), requires_grad=False)
        self.up = nn.Parameter(torch.zeros(columns, base.out_features, **like), requires_grad=False)
        self._share = share

    def forward(self, x: Tensor) -> Tensor:
        """x ``[1, T, in]`` -> ``[1, T, out]``."""
        y: Tensor = self.base(x)
        tokens = self._share.tokens
        if tokens is not None:
            inner = linear(x[0, tokens], self.down) * self._share.own
            y[0].index_add_(0, tokens, linear(inner, self.up.T))
        return y

    def put(self, columns: slice, down: Tensor | None, up: Tensor | None) -> None:
        """Fill these columns with an adapter's weights, or with nothing."""
        for stack, weight in ((self.down, down), (self.up, None if up is None else up.T)):
            stack[columns] = 0
            if weight is not None:
                stack[columns.start : columns.start + len(weight)] = weight.to(stack)


class Adapters:
    """The adapters of one model: ``places`` of them in memory at a time, the least recently used one gives way.

    ``known``: by name. Raises AdapterRefused when one doesn't fit the model.
    """

    def __init__(self, module: PreTrainedModel, known: Mapping[str, Path], places: int) -> None:
        self._known = {name: Adapter.open(name, path) for name, path in known.items()}
        self._rank = max((adapter.rank for adapter in self._known.values()), default=0)
        self._share = _Share()
        self._places: OrderedDict[str, int] = OrderedDict()
        self._free = list(range(places))
        self._num_places = places
        self._of_slot: dict[int, str] = {}
        self._layers: dict[str, AdaptedLinear] = {}
        for adapter in self._known.values():
            for layer in adapter.layers - self._layers.keys():
                self._layers[layer] = _adapt(module, layer, adapter.name, places * self._rank, self._share)
            _check(adapter, self._layers)

    def assign(self, slot: int, name: str) -> None:
        """From now on the slot goes through this adapter; "": the base model alone."""
        self._of_slot[slot] = name

    def use(self, slots: Sequence[int], lengths: Sequence[int]) -> bool:
        """The next step's tokens are so many of each of these slots, one after the other; says whether any has an adapter. Loads
        what isn't in memory.

        Raises ValueError for more adapters at once than there are places.
        """
        names = [self._of_slot[slot] for slot in slots]
        needed = dict.fromkeys(filter(None, names))
        if len(needed) > self._num_places:
            raise ValueError(f"{len(needed)} adapters in one step, {self._num_places} at once are served")
        self._share.tokens = None
        if not needed:
            return False
        for name in needed:
            self._place(name, needed)
        of_row = torch.tensor([self._places.get(name, -1) for name in names])
        place = of_row.repeat_interleave(torch.tensor(lengths))
        tokens = (place >= 0).nonzero()[:, 0]
        own = nn.functional.one_hot(place[tokens], self._num_places).repeat_interleave(self._rank, dim=1)
        some = next(iter(self._layers.values())).down
        self._share.tokens, self._share.own = tokens.to(some.device), own.to(some)
        return True

    def __bool__(self) -> bool:
        return bool(self._known)

    def _place(self, name: str, needed: Mapping[str, None]) -> None:
        if name not in self._places:
            if not self._free:
                oldest = next(other for other in self._places if other not in needed)
                self._free.append(self._places.pop(oldest))
            self._load(name, self._free[-1])
            self._places[name] = self._free.pop()
        self._places.move_to_end(name)

    def _load(self, name: str, place: int) -> None:
        columns = slice(place * self._rank, (place + 1) * self._rank)
        weights = self._known[name].weights()
        for layer, adapted in self._layers.items():
            adapted.put(columns, *weights.get(layer, (None, None)))


def _adapt(module: PreTrainedModel, layer: str, adapter: str, columns: int, share: _Share) -> AdaptedLinear:
    """Put an adapted layer in the place of a linear one."""
    parent, _, name = layer.rpartition(".")
    try:
        owner = module.get_submodule(parent)
        base = owner.get_submodule(name)
    except AttributeError:
        raise AdapterRefused(f"adapter {adapter}: the model has no layer {layer}") from None
    if type(base) is not nn.Linear or base is module.get_output_embeddings():
        raise AdapterRefused(f"adapter {adapter}: {layer} is no linear layer below the head")
    adapted = AdaptedLinear(base, columns, share)
    setattr(owner, name, adapted)
    return adapted


def _check(adapter: Adapter, layers: Mapping[str, AdaptedLinear]) -> None:
    for name, (down, up) in adapter.weights().items():
        layer, rank = layers[name], adapter.rank
        expected = ((rank, layer.in_features), (layer.out_features, rank))
        if (tuple(down.shape), tuple(up.shape)) != expected:
            raise AdapterRefused(f"adapter {adapter.name}: the weights of {name} have other shapes than the model's")
