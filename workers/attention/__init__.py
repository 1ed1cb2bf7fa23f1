"""Paged attention backends, one file each behind one interface."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal

import torch

from workers.attention.base import AttentionBackend, Attributes, LayerShape, RaggedBatch
from workers.attention.cpu import CpuAttention
from workers.attention.cuda import CudaAttention
from workers.attention.reference import ReferenceAttention

__all__ = ["AttentionBackend", "Attributes", "BackendName", "LayerShape", "RaggedBatch", "choose"]

BackendName = Literal["auto", "reference", "cpu", "cuda"]

BACKENDS: dict[str, type[AttentionBackend]] = {
    backend.name: backend for backend in (ReferenceAttention, CpuAttention, CudaAttention)
}

logger = logging.getLogger(__name__)


def choose(
    name: BackendName,
    device: torch.device,
    dtype: torch.dtype,
    layers: Sequence[LayerShape],
    *,
    block_size: int = 16,
    attributes: Sequence[Attributes] = (),
    kv_dtype: torch.dtype | None = None,
) -> type[AttentionBackend]:
    """The backend class to build for a model; `auto` takes the device's own kernel, or the reference where it can't.

    attributes: what the model's layers ask for (softcap, sinks), which not every kernel has. kv_dtype: what keys and values are
    to be held as, if not as the model's ``dtype``.
    Raises ValueError when a backend asked for by name cannot serve the model, with the reason.
    """
    backend = BACKENDS.get(device.type, ReferenceAttention) if name == "auto" else BACKENDS[name]
    reason = backend.unsupported(layers, block_size, dtype, device, attributes, kv_dtype)
    if reason is None:
        logger.info("attention backend %s on %s", backend.name, device)
        return backend
    if name != "auto":
        raise ValueError(f"attention backend {name!r} cannot serve this model: {reason}")
    logger.warning("attention backend reference on %s, not %s: %s", device, backend.name, reason)
    return ReferenceAttention
