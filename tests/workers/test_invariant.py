"""Products, activations and attention that don't depend on the batch, and the proof of it at load."""

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from torch import nn
from torch.nn import functional

from protocol.plan import Sampling
from tests.workers.adapters import adapt
from tests.workers.attention.histories import Sequences, fresh, histories
from tests.workers.configs import worker_config
from tests.workers.engine import LocalEngine
from tests.workers.models import SERVED, save, tiny
from workers import selftest
from workers.__main__ import start
from workers.attention import choose
from workers.attention.cpu import CpuAttention
from workers.attention.reference import ReferenceAttention
from workers.invariant import FixedShapes, fix_shapes, one_by_one
from workers.model import ModelRefused, adopt
from workers.packing import pack
from workers.ranks import Ranks

BIAS, WEIGHT = torch.randn(40), torch.randn(40, 300)
OPERATIONS = {
    "linear": lambda x: functional.linear(x, WEIGHT, BIAS),
    "linear without bias": lambda x: functional.linear(x, weight=WEIGHT),
    "layer": nn.Linear(300, 7),
    "matmul": lambda x: x @ WEIGHT.T,
    "addmm": lambda x: torch.addmm(BIAS, x, WEIGHT.T),
    "gelu": lambda x: functional.gelu(x, approximate="tanh"),
    "silu": functional.silu,
    "sigmoid": torch.sigmoid,
    "exp": lambda x: x.exp(),
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("threads", [1, 3])
@torch.inference_mode()
def test_a_row_is_the_same_bits_in_any_company(name, threads):
    operation, x = OPERATIONS[name], torch.randn(301, 300)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        torch.testing.assert_close(_fixed(operation, x), operation(x))
        alone = torch.cat([_fixed(operation, row[None]) for row in x])
        for first, last in [(0, 301), (3, 20), (100, 133), (300, 301)]:
            assert torch.equal(_fixed(operation, x[first:last]), alone[first:last])
    finally:
        torch.set_num_threads(before)


def _fixed(operation, x: torch.Tensor) -> torch.Tensor:
    with FixedShapes():
        return operation(x)


@settings(max_examples=8, deadline=None)
@given(history=histories())
def test_attention_one_by_one_is_the_same_bits_however_a_prompt_is_cut(history):
    sequences, backend = Sequences(history), one_by_one(ReferenceAttention)
    cut = sequences.replay(fresh(backend, history))
    for row, length in enumerate(history.lengths):
        (whole,) = sequences.attend(fresh(backend, history), [0] * len(history.lengths), history.lengths, [row])
        assert torch.equal(cut[row], whole), length


def test_a_backend_that_is_exact_stays_as_it_is():
    assert one_by_one(CpuAttention) is CpuAttention


@pytest.mark.parametrize(
    ("kind", "attention"),
    [*((kind, "cpu") for kind in sorted(SERVED)), *((kind, "reference") for kind in ("llama", "gemma2", "gpt_oss"))],
)
def test_every_served_model_can_be_made_exact(kind, attention):
    model = adopt(tiny(kind), Path())
    expected = selftest.expect(model)
    backend = one_by_one(choose(attention, model.device, model.dtype, model.layers, block_size=8))
    pack(model.module, "auto")
    fix_shapes(model.module)
    selftest.check_invariant(model, backend, 8, 130)
    selftest.check(model, backend, 8, expected)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2"])
def test_a_model_whose_layers_are_all_ours_is_exact_as_it_is(kind):
    """Those that docs/determinism.md names."""
    model = adopt(tiny(kind), Path())
    pack(model.module, "auto")
    selftest.check_invariant(model, CpuAttention, 8, 130)


@pytest.mark.parametrize(
    "settings", [{"weights": "plain"}, {"dtype": "bfloat16"}, {"weights": "int8"}], ids=["plain", "bfloat16", "int8"]
)
def test_a_worker_starts_exact(tmp_path, settings):
    start(worker_config(save(tiny("llama", hidden_size=256), tmp_path), batch_invariant=True, **settings), Ranks(1))


def test_what_can_not_be_proven_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("workers.__main__.fix_shapes", lambda _: None)
    with pytest.raises(ModelRefused, match="can't be served with batch_invariant"):
        start(
            worker_config(save(tiny("llama", hidden_size=256), tmp_path), batch_invariant=True, weights="plain"),
            Ranks(1),
        )


@pytest.mark.parametrize(
    "settings",
    [
        {"weights": "plain", "batch_invariant": True},
        {"weights": "float32"},
        {"weights": "bfloat16"},
        {"weights": "int8", "batch_invariant": True},
    ],
    ids=lambda settings: settings["weights"],
)
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_the_rows_of_an_adapter_are_the_same_bits_in_any_company_and_wherever_it_lies(tmp_path, settings):
    base = tiny("llama", hidden_size=256)
    paths = {}
    for number, name in enumerate("abcd"):
        paths[name] = tmp_path / name
        adapt(base, paths[name], number, r=8, lora_alpha=16, target_modules=["q_proj", "down_proj"])

    def scores(*names: str) -> list:
        engine = LocalEngine(copy.deepcopy(base), adapters=paths, budget=40, **settings)
        for name in names:
            engine.submit(name, [*range(3, 14)], 12, Sampling(logprobs=0), adapter=name)
        engine.finish()
        return engine.scored["d"]

    alone = scores("d")
    assert scores("a", "b", "c", "d") == alone
    assert scores("c", "d", "a") == alone
