"""Low-rank adapters of PEFT (Hu et al., "LoRA", 2021) beside one base model: every row of a batch goes through its own, or none.

Here they are opened, and given places in memory and to slots; what they add to packed layers is in `workers.packed_adapters`, and
to torch's own in `workers.adapted` (cf. Punica and S-LoRA, MLSys'24).
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from workers.adapted import Share
from workers.linear import PackedLinear
from workers.packed_adapters import PackedShare

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


class _Layer(Protocol):
    """What adapters add to a layer, which stands in for as many of the model's as it has ``widths``, their output features."""

    @property
    def in_features(self) -> int: ...

    @property
    def widths(self) -> tuple[int, ...]: ...

    def put(self, place: int, weights: Mapping[int, tuple[Tensor, Tensor]]) -> None:
        """Fill a place with an adapter's A ``[rank, in]`` and B ``[out, rank]`` of each part that it changes."""


class Adapters:
    """The adapters of one model: ``places`` of them in memory at a time, the least recently used one gives way.

    ``known``: by name. Raises AdapterRefused when one doesn't fit the model, which must have been packed if it is to be.
    """

    def __init__(self, module: PreTrainedModel, known: Mapping[str, Path], places: int) -> None:
        self._known = {name: Adapter.open(name, path) for name, path in known.items()}
        rank = max((adapter.rank for adapter in self._known.values()), default=0)
        packed = any(isinstance(layer, PackedLinear) for layer in module.modules())
        self._share = PackedShare(places, rank) if packed else Share(places, rank, module.dtype, module.device)
        self._places: OrderedDict[str, int] = OrderedDict()
        self._free = list(range(places))
        self._num_places = places
        self._of_slot: dict[int, str] = {}
        #: By the product's own name; and of each of the model's layers, which part of which product it is.
        self._products: dict[str, _Layer] = {}
        self._parts: dict[str, tuple[str, int]] = {}
        for adapter in self._known.values():
            for name, (down, up) in adapter.weights().items():
                layer, part = self._adapt(module, adapter.name, name)
                expected = ((adapter.rank, layer.in_features), (layer.widths[part], adapter.rank))
                if (tuple(down.shape), tuple(up.shape)) != expected:
                    raise AdapterRefused(
                        f"adapter {adapter.name}: the weights of {name} have other shapes than the model's"
                    )

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
        for name in needed:
            self._place(name, needed)
        place = torch.tensor([self._places.get(name, -1) for name in names])
        self._share.set(place.repeat_interleave(torch.tensor(lengths)) if needed else None)
        return bool(needed)

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
        weights: dict[str, dict[int, tuple[Tensor, Tensor]]] = {product: {} for product in self._products}
        for layer, of_layer in self._known[name].weights().items():
            product, part = self._parts[layer]
            weights[product][part] = of_layer
        for product, of_product in weights.items():
            self._products[product].put(place, of_product)

    def _adapt(self, module: PreTrainedModel, adapter: str, layer: str) -> tuple[_Layer, int]:
        """The layer that does this one's work, adapted, and which part of it that is."""
        if layer not in self._parts:
            parent, _, name = layer.rpartition(".")
            try:
                owner = module.get_submodule(parent)
                own, part = _product(owner, name)
                base = owner.get_submodule(own)
            except AttributeError:
                raise AdapterRefused(f"adapter {adapter}: the model has no layer {layer}") from None
            product = f"{parent}.{own}"
            if product not in self._products:
                adapted = None if base is module.get_output_embeddings() else self._share.adapt(owner, own)
                if adapted is None:
                    raise AdapterRefused(f"adapter {adapter}: {layer} is no linear layer below the head")
                self._products[product] = adapted
            self._parts[layer] = product, part
        product, part = self._parts[layer]
        return self._products[product], part


def _product(owner: nn.Module, name: str) -> tuple[str, int]:
    """Under which name a layer of the model's is found, and which part of what is found it is."""
    merged: Mapping[str, tuple[str, ...]] = getattr(owner, "merged", {})
    return next(((product, parts.index(name)) for product, parts in merged.items() if name in parts), (name, 0))
