"""A decoder layer of packed parts, computed by one call where its attention is over the CPU's paged KV cache.

What is in a step besides its kernels, modules calling modules and tensors being made, costs up to a third of a millisecond a
layer: a product leaves the caches full of weights, so the interpreter starts from memory each time.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int64, c_void_p
from functools import cache, cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from workers import trial
from workers.attention.cpu import Call, CpuAttention
from workers.bridge import PagedStep, attributes_of, under_way
from workers.kernels import FOLDER
from workers.kernels.compiler import address_of, load_library
from workers.linear import PackedLinear
from workers.linear import kernel as products
from workers.norm import RMSNorm
from workers.packed_attention import PackedAttention, observed
from workers.packed_mlp import PackedMLP
from workers.rotary import Heads
from workers.rotary import kernel as rotary

SOURCE = FOLDER / "decoder_layers.cpp"
#: Of a layer, besides its norms.
_PARTS = {"self_attn": PackedAttention, "mlp": PackedMLP}


class _Kernels(ctypes.Structure):
    _fields_ = tuple((name, c_void_p) for name in ("norm", "multiply", "rotate", "attend"))


class _Norm(ctypes.Structure):
    _fields_ = (("weight", c_void_p), ("epsilon", c_float))


class Norms(NamedTuple):
    """What each is called in a layer; there may be none behind its parts, where what they give is added to their input."""

    before_attention: str
    after_attention: str | None
    before_mlp: str
    after_mlp: str | None


LLAMA = Norms("input_layernorm", None, "post_attention_layernorm", None)
GEMMA = Norms("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")


class _DecoderLayer(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("qkv", "output", "gate_up", "down")),
        *((name, _Norm) for name in Norms._fields),
        *((name, c_int64) for name in ("index", "head_dim")),
        *((name, Heads) for name in ("queries", "keys")),
        ("attention", Call),
        ("next", c_void_p),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        ("tokens", c_int64),
        ("wanted", c_void_p),
        ("wanted_count", c_int64),
        *((name, c_void_p) for name in ("cos", "sin", "runs", "caches", "batch", "scratch")),
        ("threads", c_int64),
    )


class PackedLayer(nn.Module):
    """As transformers' LlamaDecoderLayer or Gemma3DecoderLayer, and with its names. Raises CompileError."""

    def __init__(self, layer: Any, norms: Norms) -> None:
        super().__init__()
        self.self_attn: PackedAttention = layer.self_attn
        self.mlp: PackedMLP = layer.mlp
        for name in filter(None, norms):
            setattr(self, name, getattr(layer, name))
        self._norms = norms
        attention, mlp, kernels = self.self_attn, self.mlp, _library()
        self.products: tuple[Any, ...] = (attention.qkv, attention.o_proj, mlp.gate_up, mlp.down_proj)
        # It holds what the copy of it in the layer has the address of.
        self._call = self._asked()
        self._layer = _DecoderLayer(
            *(product.address for product in self.products),
            *(_Norm(norm.weight_address, norm.epsilon) if norm else _Norm() for norm in self.norms()),
            attention.layer_idx,
            attention.head_dim,
            *attention.turned,
            self._call,
        )
        self._address, self._kernels = ctypes.addressof(self._layer), kernels
        # One or none, in a list, since it is no part of this one.
        self._following: list[PackedLayer] = []
        self._follows = False
        #: Whether what it gives for a token is read for no other one.
        self.ends = False

    def link(self, following: PackedLayer) -> None:
        """From now on compute that one along with this one, which gives it its input, and nothing is done between them."""
        self._following, following._follows = [following], True
        self._layer.next = following._address

    @cached_property
    def linked(self) -> tuple[PackedLayer, ...]:
        """This layer and those that are computed along with it; asked for once all are linked."""
        return (self, *(each for following in self._following for each in following.linked))

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        past_key_values: Any = None,
        **more: Any,
    ) -> Tensor:
        """hidden_states ``[1, T, width]``, position_embeddings two of ``[1, T, head_dim]`` -> ``[1, T, width]``."""
        at_once = step_at_once()
        if past_key_values is None and at_once is not None:
            step, backend = at_once
            if not (self._follows and hidden_states is step.ahead):
                step.ahead = self._from_here(hidden_states, position_embeddings, step, backend)
            return step.ahead
        before_attention, after_attention, before_mlp, after_mlp = self.norms()
        attended, _ = self.self_attn(
            hidden_states=before_attention(hidden_states),
            position_embeddings=position_embeddings,
            past_key_values=past_key_values,
            **more,
        )
        hidden_states = _added(attended, after_attention, hidden_states)
        return _added(self.mlp(before_mlp(hidden_states)), after_mlp, hidden_states)

    def norms(self) -> tuple[Any, ...]:
        """Its own, in the order of `Norms`; None for those that it hasn't got."""
        return tuple(name and getattr(self, name) for name in self._norms)

    def _from_here(
        self, x: Tensor, position_embeddings: tuple[Tensor, Tensor], paged: PagedStep, backend: CpuAttention
    ) -> Tensor:
        """What the last of the linked layers gives, for those tokens at least of which it is wanted. Raises ValueError for what
        doesn't fit the layer or the batch."""
        tokens, dim = len(paged.batch.cache_slots), self.self_attn.head_dim
        x, cos, sin = (each.contiguous() for each in (x, *position_embeddings))
        if x.shape != (1, tokens, self.products[0].in_features) or not cos.shape == sin.shape == (1, tokens, dim):
            raise ValueError(f"{list(x.shape)}, turned by {list(cos.shape)}, isn't a step of {tokens} tokens")
        if {x.dtype, cos.dtype, sin.dtype} != {torch.float32}:
            raise ValueError(f"expected float32, got {x.dtype}, turned by {cos.dtype}")
        scratch, y = torch.empty(tokens * self._kernels.scratch_width(self._address)), torch.empty_like(x)
        runs = self._runs(tokens)
        wanted = None
        if paged.wanted is not None and self.linked[-1].ends and runs is None:
            wanted = paged.wanted.contiguous()
        step = _Step(
            tokens,
            *((None, tokens) if wanted is None else (wanted.data_ptr(), len(wanted))),
            cos.data_ptr(),
            sin.data_ptr(),
            runs,
            *backend.addresses(paged.batch),
            scratch.data_ptr(),
            torch.get_num_threads(),
        )
        functions = _functions(backend.kernel_address)
        self._kernels.decoder_layers(
            self._address, ctypes.addressof(functions), ctypes.addressof(step), x.data_ptr(), y.data_ptr()
        )
        return y

    def _runs(self, tokens: int) -> int | None:
        """Of the step, if a product of a linked layer has adapters: they are all told of the same rows."""
        products = (product for layer in self.linked for product in layer.products)
        return next(filter(None, (product.runs(tokens) for product in products)), None)

    def _asked(self) -> Call:
        """What the layer asks of attention in every step: query, key and value of a token lie one after the other."""
        width, dim = self.self_attn.qkv.out_features, self.self_attn.head_dim
        axes = (("token", width), ("head", dim))
        strides = {f"{name}_{axis}": stride for name in ("query", "key", "value") for axis, stride in axes}
        return Call.asking(attributes_of(dim, **self.self_attn.given), **strides)


def _norms(layer: nn.Module) -> Norms | None:
    """What a layer calls them that consists of packed parts and norms of these names; else None."""
    kinds = {name: type(part) for name, part in layer.named_children()}
    for norms in (LLAMA, GEMMA):
        if kinds == _PARTS | dict.fromkeys(filter(None, norms), RMSNorm):
            return norms
    return None


def _added(x: Tensor, norm: RMSNorm | None, residual: Tensor) -> Tensor:
    return residual + x if norm is None else norm(x, residual)


def step_at_once() -> tuple[PagedStep, CpuAttention] | None:
    """The step under way, and its attention if that is such that whole layers are computed by one call."""
    step = under_way()
    if isinstance(step, PagedStep) and isinstance(step.backend, CpuAttention):
        return step, step.backend
    return None


def packed_layer(_: torch.dtype, layer: Any) -> PackedLayer | None:
    """One in the place of a layer whose parts are packed, and which does just this with them on random tokens; else None."""
    norms = _norms(layer)
    if norms is None:
        return None
    if not all(type(part) is PackedLinear for part in (layer.self_attn.o_proj, layer.mlp.down_proj)):
        return None
    ours = PackedLayer(layer, norms)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1, trial.ROWS, layer.self_attn.qkv.in_features, generator=draw)
    embeddings = tuple(torch.randn(2, 1, trial.ROWS, layer.self_attn.head_dim, generator=draw))
    try:
        with observed(layer.self_attn):
            expected, found = (each(x, position_embeddings=embeddings, attention_mask=None) for each in (layer, ours))
    except (TypeError, RuntimeError):
        return None  # it takes other arguments
    return ours if isinstance(expected, Tensor) and trial.agree(found, expected) else None


@cache
def _library() -> ctypes.CDLL:
    """Raises CompileError."""
    library = load_library(SOURCE)
    library.decoder_layers.argtypes, library.decoder_layers.restype = (c_void_p,) * 5, None
    library.scratch_width.argtypes, library.scratch_width.restype = (c_void_p,), c_int64
    return library


@cache
def _functions(attend: int | None) -> _Kernels:
    """With attention's at this address."""
    return _Kernels(*map(address_of, (products().rms_norm, products().linear, rotary())), attend)
