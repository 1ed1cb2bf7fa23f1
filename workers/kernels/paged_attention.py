"""Paged attention over a ragged batch on CUDA, in Triton, which torch's CUDA builds bring along.

One program computes some tokens of one row for the query heads that share a KV head, so that keys and values are read once for
all of them. Softmax is online, in base 2 (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018; Dao et al.,
"FlashAttention", NeurIPS'22). Where a step is decodes alone and there are too few for the device, each row's context is split
between programs whose parts are merged (cf. "Flash-Decoding", 2023).
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.attention.base import Attributes, LayerShape, RaggedBatch

_LOG2E = tl.constexpr(1.4426950408889634)
#: A product of matrices has 16 rows at least.
_LEAST = 16
#: Rows of queries in a program where prompts are computed.
_PROMPT_ROWS = 64
#: Programs for each multiprocessor that keep its memory busy; more parts than `_MOST_PARTS` cost more to merge than they gain.
_PROGRAMS_PER_PROCESSOR = 8
_MOST_PARTS = 16


@triton.jit
def _row_of(block, query_start, rows, TOKENS: tl.constexpr):
    """Which row a block of queries belongs to: row r's begin at query_start[r] // TOKENS + r, so none holds tokens of two."""
    low, high = 0, rows
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(query_start + middle) // TOKENS + middle <= block:
            low = middle
        else:
            high = middle
    return low


@triton.jit(do_not_specialize=["rows", "table_row"])
def _attend(
    query,
    keys,
    values,
    output,
    parts,
    query_start,
    context_len,
    block_table,
    sinks,
    scale,
    softcap,
    window,
    rows,
    query_token,
    query_head,
    key_block,
    key_token,
    key_head,
    value_block,
    value_token,
    value_head,
    table_row,
    GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_PAD: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    QUERIES: tl.constexpr,
    TILE: tl.constexpr,
    PARTS: tl.constexpr,
    DECODES: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    SINKS: tl.constexpr,
):
    """Grid: KV heads, blocks of queries, parts of the context."""
    kv_head, block, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    TOKENS: tl.constexpr = QUERIES // GROUP
    if DECODES:
        row, begin, skipped, length = block, block, 0, 1
    else:
        row = _row_of(block, query_start, rows, TOKENS)
        begin = tl.load(query_start + row)
        skipped = (block - begin // TOKENS - row) * TOKENS
        length = tl.load(query_start + row + 1) - begin
        if skipped >= length:
            return
    context = tl.load(context_len + row)

    # The matrix's row i is query head i % GROUP of the block's token i // GROUP.
    index = tl.arange(0, QUERIES)
    token = skipped + index // GROUP
    head = kv_head * GROUP + index % GROUP
    real = (index < TOKENS * GROUP) & (token < length)
    position = context - length + token
    key_at, value_at = tl.arange(0, KEY_PAD), tl.arange(0, VALUE_PAD)
    q = tl.load(
        query + (begin + token).to(tl.int64)[:, None] * query_token + head[:, None] * query_head + key_at[None, :],
        mask=real[:, None] & (key_at < KEY_DIM)[None, :],
        other=0.0,
    )

    # Keys that some query of this block sees, and of those this program's part.
    first, last = 0, tl.minimum(context, context - length + skipped + TOKENS)
    if WINDOWED:
        first = tl.maximum(0, context - length + skipped - window + 1)
    start = first // TILE * TILE
    if PARTS > 1:
        share = tl.cdiv(tl.cdiv(last - start, TILE), PARTS) * TILE
        start += part * share
        last = tl.minimum(last, start + share)

    if SINKS:
        top = tl.load(sinks + head, mask=real, other=0.0).to(tl.float32) * _LOG2E
        top = tl.where(part == 0, top, float("-inf"))
        total = tl.where(top > float("-inf"), 1.0, 0.0)
    else:
        top = tl.full([QUERIES], float("-inf"), tl.float32)
        total = tl.zeros([QUERIES], tl.float32)
    mixed = tl.zeros([QUERIES, VALUE_PAD], tl.float32)
    for tile in range(start, last, TILE):
        at = tile + tl.arange(0, TILE)
        # What no query sees may lie in a block that was freed: zero times whatever is there need not be zero.
        there = (at >= first) & (at < last)
        held = tl.load(block_table + row * table_row + at // BLOCK_SIZE, mask=there, other=0).to(tl.int64)
        k = tl.load(
            keys + (held * key_block + at % BLOCK_SIZE * key_token)[None, :] + kv_head * key_head + key_at[:, None],
            mask=there[None, :] & (key_at < KEY_DIM)[:, None],
            other=0.0,
        )
        scores = tl.dot(q, k, input_precision="ieee") * scale
        if CAPPED:
            # tanh by its definition; far out it is 1 or -1, as it should be.
            scores = softcap * (1 - 2 / (tl.exp(2 * scores / softcap) + 1))
        seen = there[None, :] & (at[None, :] <= position[:, None])
        if WINDOWED:
            seen &= at[None, :] > position[:, None] - window
        scores = tl.where(seen, scores * _LOG2E, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        # A query that has seen nothing yet has no top to subtract.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - base[:, None])
        faded = tl.exp2(top - base)
        v = tl.load(
            values
            + (held * value_block + at % BLOCK_SIZE * value_token)[:, None]
            + kv_head * value_head
            + value_at[None, :],
            mask=there[:, None] & (value_at < VALUE_DIM)[None, :],
            other=0.0,
        )
        mixed = mixed * faded[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        total = total * faded + tl.sum(weights, 1)
        top = higher

    heads = tl.num_programs(0) * GROUP
    place = (begin + token).to(tl.int64) * heads + head
    if PARTS > 1:
        # Of every part the sum of values, then the sum of weights, then their top.
        width: tl.constexpr = VALUE_DIM + 2
        target = parts + (place * PARTS + part) * width
        tl.store(target[:, None] + value_at[None, :], mixed, mask=real[:, None] & (value_at < VALUE_DIM)[None, :])
        tl.store(target + VALUE_DIM, total, mask=real)
        tl.store(target + VALUE_DIM + 1, top, mask=real)
    else:
        mixed = mixed / tl.where(total == 0, 1.0, total)[:, None]
        tl.store(
            output + place[:, None] * VALUE_DIM + value_at[None, :],
            mixed.to(output.dtype.element_ty),
            mask=real[:, None] & (value_at < VALUE_DIM)[None, :],
        )


@triton.jit
def _merge(parts, output, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr, PARTS: tl.constexpr):
    """Grid: tokens times query heads."""
    place = tl.program_id(0).to(tl.int64)
    width: tl.constexpr = VALUE_DIM + 2
    part, value_at = tl.arange(0, PARTS), tl.arange(0, VALUE_PAD)
    source = parts + (place * PARTS + part) * width
    top = tl.load(source + VALUE_DIM + 1)
    highest = tl.max(top, 0)
    weight = tl.exp2(top - tl.where(highest == float("-inf"), 0.0, highest))
    total = tl.sum(weight * tl.load(source + VALUE_DIM), 0)
    mixed = tl.load(source[:, None] + value_at[None, :], mask=(value_at < VALUE_DIM)[None, :], other=0.0)
    merged = tl.sum(mixed * weight[:, None], 0) / tl.where(total == 0, 1.0, total)
    tl.store(output + place * VALUE_DIM + value_at, merged.to(output.dtype.element_ty), mask=value_at < VALUE_DIM)


@triton.jit
def _store(
    key,
    value,
    keys,
    values,
    cache_slots,
    key_token,
    key_head,
    value_token,
    value_head,
    HEADS: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_PAD: tl.constexpr,
    VALUE_PAD: tl.constexpr,
):
    """Grid: tokens."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(cache_slots + token)
    head, key_at, value_at = tl.arange(0, HEADS_PAD)[:, None], tl.arange(0, KEY_PAD), tl.arange(0, VALUE_PAD)
    real = (head < HEADS) & (key_at < KEY_DIM)[None, :]
    k = tl.load(key + token * key_token + head * key_head + key_at[None, :], mask=real)
    tl.store(keys + (slot * HEADS + head) * KEY_DIM + key_at[None, :], k, mask=real)
    real = (head < HEADS) & (value_at < VALUE_DIM)[None, :]
    v = tl.load(value + token * value_token + head * value_head + value_at[None, :], mask=real)
    tl.store(values + (slot * HEADS + head) * VALUE_DIM + value_at[None, :], v, mask=real)


def store(key: Tensor, value: Tensor, keys: Tensor, values: Tensor, cache_slots: Tensor) -> None:
    """Write key ``[T, H, Dk]`` and value ``[T, H, Dv]`` to caches ``[num_blocks, block_size, H, D]`` at int64 ``[T]``."""
    tokens, heads, key_dim = key.shape
    value_dim = value.shape[-1]
    _store[tokens,](
        key,
        value,
        keys,
        values,
        cache_slots,
        *_strides(key),
        *_strides(value),
        HEADS=heads,
        HEADS_PAD=triton.next_power_of_2(heads),
        KEY_DIM=key_dim,
        VALUE_DIM=value_dim,
        KEY_PAD=triton.next_power_of_2(key_dim),
        VALUE_PAD=triton.next_power_of_2(value_dim),
    )


def attend(
    query: Tensor, keys: Tensor, values: Tensor, batch: RaggedBatch, attributes: Attributes, *, in_parts: bool
) -> Tensor:
    """As `AttentionBackend.attend`, over caches that hold this step's keys and values already. ``in_parts``: whether contexts may
    be split."""
    tokens, rows = len(query), len(batch.context_len)
    shape = LayerShape(query.shape[1], keys.shape[2], keys.shape[3], values.shape[3])
    group = shape.query_heads // shape.kv_heads
    decodes = batch.max_query_len == 1
    parts = _parts(rows * shape.kv_heads, query.device) if decodes and in_parts else 1
    queries = max(_LEAST if decodes else _PROMPT_ROWS, triton.next_power_of_2(group))
    value_pad = max(_LEAST, triton.next_power_of_2(shape.value_dim))
    output = query.new_empty(tokens, shape.query_heads, shape.value_dim)
    # Where there are no parts this is never written.
    between = output
    if parts > 1:
        size = (tokens, shape.query_heads, parts, shape.value_dim + 2)
        between = torch.empty(size, dtype=torch.float32, device=query.device)
    blocks = rows if decodes else tokens // (queries // group) + rows
    _attend[shape.kv_heads, blocks, parts](
        query,
        keys,
        values,
        output,
        between,
        batch.query_start,
        batch.context_len,
        batch.block_table,
        output if attributes.sinks is None else attributes.sinks,
        attributes.scaling,
        attributes.softcap or 0.0,
        attributes.sliding_window or 0,
        rows,
        *_strides(query),
        *keys.stride()[:3],
        *values.stride()[:3],
        batch.block_table.stride(0),
        GROUP=group,
        KEY_DIM=shape.key_dim,
        VALUE_DIM=shape.value_dim,
        KEY_PAD=max(_LEAST, triton.next_power_of_2(shape.key_dim)),
        VALUE_PAD=value_pad,
        BLOCK_SIZE=keys.shape[1],
        QUERIES=queries,
        TILE=64 if max(shape.key_dim, shape.value_dim) <= 128 else 32,
        PARTS=parts,
        DECODES=decodes,
        WINDOWED=attributes.sliding_window is not None,
        CAPPED=attributes.softcap is not None,
        SINKS=attributes.sinks is not None,
        num_warps=4,
        num_stages=3 if decodes else 2,
    )
    if parts > 1:
        _merge[tokens * shape.query_heads,](
            between, output, VALUE_DIM=shape.value_dim, VALUE_PAD=value_pad, PARTS=parts, num_warps=1
        )
    return output


def _parts(programs: int, device: torch.device) -> int:
    """Into how many each context is split, a power of 2."""
    wanted = min(_PROGRAMS_PER_PROCESSOR * _processors(device) // programs, _MOST_PARTS)
    return 1 << max(wanted, 1).bit_length() - 1


@cache
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 1


def _strides(tensor: Tensor) -> tuple[int, int]:
    """Of a token and of a head. Raises ValueError for a last dimension that isn't dense."""
    token, head, element = tensor.stride()
    if element != 1 and tensor.shape[-1] > 1:
        raise ValueError(f"expected a dense last dimension, got strides {tensor.stride()}")
    return token, head
