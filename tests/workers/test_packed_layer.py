"""Decoder layers computed by one call: the same bits as by their modules, and only where that is what the model does."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from protocol.plan import Admission, Row, Sampling, StepPlan
from tests.workers.models import tiny
from workers.attention.cpu import CpuAttention
from workers.bridge import NAME, PagedStep, attending
from workers.forward import forward
from workers.linear import FORMATS
from workers.linked_layers import LinkedLayers
from workers.model import Model, adopt
from workers.packed_attention import PackedAttention
from workers.packed_layer import PackedLayer
from workers.packing import pack
from workers.slots import Inputs, Slots

BLOCK_SIZE, BLOCKS = 8, 6
#: Prompts cut so that decodes and prefills share steps, and beside them so many decodes that their blocks are fetched ahead.
DECODES = 17
CHUNKS = [
    (10, 0, 1, *[20] * DECODES),
    (1, 17, 1, *[1] * DECODES),
    (9, 1, 20, *[1] * DECODES),
    (1, 1, 1, *[1] * DECODES),
]
SEQUENCES = 3 + DECODES


@dataclass
class Sequences:
    """All of them over a cache of their own."""

    model: Model

    def __post_init__(self) -> None:
        device = torch.device("cpu")
        self.backend = CpuAttention(
            self.model.layers, SEQUENCES * BLOCKS, BLOCK_SIZE, torch.float32, device, self.model.kv_dtype
        )
        self.slots = Slots(SEQUENCES, BLOCKS, BLOCK_SIZE, device)
        draw = torch.Generator().manual_seed(1)
        for slot in range(SEQUENCES):
            prompt = torch.randint(0, self.model.vocab_size, (BLOCKS * BLOCK_SIZE,), generator=draw).tolist()
            self.slots.admit(Admission(slot, prompt, Sampling(), len(prompt)))
            blocks = [SEQUENCES * index + slot for index in range(BLOCKS)]
            self.slots.extend([Row(slot, 0, 0, blocks, sample=False)])

    def steps(self) -> list[Inputs]:
        done, steps = [0] * SEQUENCES, []
        for lengths in CHUNKS:
            rows = [Row(slot, done[slot], length, [], sample=True) for slot, length in enumerate(lengths) if length]
            steps.append(self.slots.inputs(StepPlan(0, [], [], rows)))
            done = [before + length for before, length in zip(done, lengths, strict=True)]
        return steps


def at_once(model: Model) -> list[Tensor]:
    """Logits of all steps' tokens."""
    run = Sequences(model)
    return [forward(model.module, run.backend, inputs) for inputs in run.steps()]


def module_by_module(model: Model) -> list[Tensor]:
    """The same, by the layers' own modules: they know nothing of who attends."""
    run, logits = Sequences(model), []
    for inputs in run.steps():
        step = PagedStep(run.backend, inputs.batch)
        with attending(lambda *call, step=step: step(*call)):
            out = model.module(input_ids=inputs.ids[None], position_ids=inputs.positions[None], use_cache=False)
        logits.append(out.logits[0])
    return logits


def packed(module: nn.Module, tmp_path, weights="float32") -> Model:
    model = adopt(module, tmp_path)
    pack(model.module, weights)
    return model


def layers(model: Model) -> list[PackedLayer]:
    return [layer for layer in model.module.modules() if isinstance(layer, PackedLayer)]


def calls(monkeypatch) -> list[PackedLayer]:
    """Of whom the kernel was called, from now on."""
    called, plain = [], PackedLayer._from_here

    def hear(self, *given):
        called.append(self)
        return plain(self, *given)

    monkeypatch.setattr(PackedLayer, "_from_here", hear)
    return called


@torch.inference_mode()
@pytest.mark.parametrize("weights", [str(format).removeprefix("torch.") for format in FORMATS])
@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gemma2"])
def test_the_same_bits_as_module_by_module_in_one_call(kind, kv_dtype, weights, tmp_path, monkeypatch):
    """mistral has a sliding window, qwen2 biases; qwen3 normalises its queries and keys, gemma2 what its parts give, too."""
    features = {"gemma2": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}}.get(kind, {})
    model = replace(packed(tiny(kind, num_hidden_layers=3, **features), tmp_path, weights), kv_dtype=kv_dtype)
    expected = module_by_module(model)
    called = calls(monkeypatch)
    for ours, theirs in zip(at_once(model), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert called == [layers(model)[0]] * len(CHUNKS)


@torch.inference_mode()
def test_only_the_first_of_linked_layers_is_called_in_a_step(tmp_path):
    model = packed(tiny("llama", num_hidden_layers=3), tmp_path)
    linked, passed = model.module.model.layers, []
    assert type(linked) is LinkedLayers
    for layer in linked:
        layer.register_forward_hook(lambda layer, *_: passed.append(layer.self_attn.layer_idx))
    run = Sequences(model)
    inputs = run.steps()[0]
    forward(model.module, run.backend, inputs)
    assert passed == [0]
    with attending(PagedStep(run.backend, inputs.batch)):
        assert len(linked[:2]) == len(linked[1:]) == 2, "some are not all"
    passed.clear()
    module_by_module(model)
    assert passed == [0, 1, 2] * len(CHUNKS)


@pytest.mark.parametrize("kind", ["qwen3_moe", "phi3", "gpt_oss", "olmo2"])
def test_layers_of_other_parts_stay(kind, tmp_path):
    assert not layers(packed(tiny(kind), tmp_path))


def test_a_layer_that_adds_less_than_its_parts_give_stays(tmp_path):
    """Granite scales what it adds, by a setting."""
    scaled, plain = (packed(tiny("granite", residual_multiplier=scale), tmp_path) for scale in (0.5, 1.0))
    assert PackedAttention in {type(layer) for layer in scaled.module.modules()}
    assert not layers(scaled)
    assert len(layers(plain)) == 2


@torch.inference_mode()
def test_layers_with_other_rotary_embeddings_are_calls_of_their_own(tmp_path, monkeypatch):
    """gemma3 turns the heads of its local layers by others."""
    kinds = [*["sliding_attention"] * 2, *["full_attention"] * 2, "sliding_attention"]
    model = packed(tiny("gemma3_text", num_hidden_layers=len(kinds), layer_types=kinds), tmp_path)
    expected = module_by_module(model)
    called = calls(monkeypatch)
    for ours, theirs in zip(at_once(model), expected, strict=True):
        assert torch.equal(ours, theirs)
    ours = layers(model)
    assert called == [ours[0], ours[2], ours[4]] * len(CHUNKS)


#: All sampled after; none; some, with the first and the last, and without.
WANTED = [slice(None), slice(0), slice(0, None, 29), slice(1, -1, 2)]


@torch.inference_mode()
@pytest.mark.parametrize("weights", ["float32", "int8"])
@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gemma3_text"])
def test_what_nobody_reads_of_the_last_layer_is_left_out(kind, depth, weights, tmp_path):
    """And what is read is the same bits; as are keys and values, on which the later steps stand."""
    kinds = {"layer_types": ["sliding_attention", "full_attention", "full_attention"][:depth]}
    model = packed(tiny(kind, num_hidden_layers=depth, **({} if kind == "llama" else kinds)), tmp_path, weights)
    whole, run = Sequences(model), Sequences(model)
    for part, *both in zip(WANTED, whole.steps(), run.steps(), strict=True):
        tokens = len(both[0].ids)
        wanted = torch.arange(tokens)[part]
        expected = forward(model.module, whole.backend, both[0], wanted)
        all_states = model.hidden.newest().clone()
        assert torch.equal(forward(model.module, run.backend, both[1], wanted, whole=False), expected)
        states = model.hidden.newest()
        assert torch.equal(states[wanted], all_states[wanted])
        others = torch.ones(tokens, dtype=torch.bool).index_fill(0, wanted, value=False)
        if depth > 1:  # else it is the first layer, too, and what isn't written may be what was
            assert not (states[others] == all_states[others]).all(dim=-1).any()


class Mixing(nn.Module):
    """A layer of which each token gets something of those before."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = None

    def forward(self, hidden_states: Tensor, **_: object) -> Tensor:
        return hidden_states.cumsum(dim=1)


def test_a_layer_before_one_that_mixes_tokens_is_computed_whole(tmp_path):
    last, mixed = packed(tiny("llama", num_hidden_layers=3), tmp_path), adopt(tiny("llama"), tmp_path)
    assert [layer.ends for layer in layers(last)] == [False, False, True]
    mixed.module.model.layers.append(Mixing())
    mixed.module.config.num_hidden_layers = 3
    pack(mixed.module, "float32")
    assert [layer.ends for layer in layers(mixed)] == [False, False]


class Between(nn.Module):
    """Something done between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = None

    def forward(self, hidden_states: Tensor, **_: object) -> Tensor:
        return 2 * hidden_states


@torch.inference_mode()
def test_what_is_done_between_layers_is_done(tmp_path, monkeypatch):
    model = adopt(tiny("llama", num_hidden_layers=3), tmp_path)
    decoder = model.module.model
    decoder.layers = nn.ModuleList([*decoder.layers[:2], Between(), decoder.layers[2]])
    decoder.config.num_hidden_layers = 4
    pack(model.module, "float32")
    expected = module_by_module(model)
    called = calls(monkeypatch)
    for ours, theirs in zip(at_once(model), expected, strict=True):
        assert torch.equal(ours, theirs)
    first, _, last = layers(model)
    assert called == [first, last] * len(CHUNKS)


@torch.inference_mode()
def test_what_does_not_fit_is_refused(tmp_path):
    model = packed(tiny("llama"), tmp_path)
    run, (layer, _) = Sequences(model), layers(model)
    batch = run.steps()[0].batch
    tokens, width, dim = len(batch.cache_slots), layer.self_attn.qkv.in_features, layer.self_attn.head_dim
    x, turn = torch.randn(1, tokens, width), torch.randn(1, tokens, dim)
    with attending(PagedStep(run.backend, batch)):
        assert layer(x, (turn, turn)).shape == x.shape
        for wrong in ((x[:, 1:], turn), (x, turn[:, 1:]), (x[..., 1:], turn)):
            with pytest.raises(ValueError, match=f"isn't a step of {tokens} tokens"):
                layer(wrong[0], (wrong[1], wrong[1]))
        with pytest.raises(ValueError, match=r"expected float32, got torch\.float64"):
            layer(x.double(), (turn, turn))


def test_transformers_own_attention_is_not_passed_by(tmp_path):
    """Outside of a step a packed model attends as it is set to, over no cache of ours."""
    model, plain = packed(tiny("llama"), tmp_path), tiny("llama")
    ids = torch.arange(3, 40)[None]
    model.module.set_attn_implementation("eager")
    torch.testing.assert_close(model.module(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)
    model.module.set_attn_implementation(NAME)
