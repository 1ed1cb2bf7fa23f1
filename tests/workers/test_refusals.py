"""Models that a ragged paged batch would serve wrongly are refused at load, with the reason."""

import json
from pathlib import Path

import pytest
import torch

from scheduler.chat import Chat
from tests.workers.models import REFUSED, SERVED, save, tiny
from workers import selftest
from workers.attention import choose
from workers.model import ModelRefused, adopt, load
from workers.packing import pack


@pytest.mark.parametrize("kind", sorted(SERVED))
def test_served_models_pass_the_self_test(kind):
    model = adopt(tiny(kind), Path())
    backend = choose("auto", model.device, model.dtype, model.layers, block_size=8, attributes=model.attributes)
    expected = selftest.expect(model)
    pack(model.module, "auto")
    selftest.check(model, backend, 8, expected)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("mamba", "recurrent state|layers of type"),
        ("jamba", "recurrent state|layers of type"),
        ("lfm2", "layers of type conv"),
        ("granitemoehybrid", "recurrent state|layers of type"),
    ],
)
def test_stateful_models_are_refused(kind, reason):
    assert kind in REFUSED
    with pytest.raises(ModelRefused, match=reason):
        adopt(tiny(kind), Path())


def test_models_without_attention_interface_are_refused():
    model = tiny("bloom", n_layer=2, n_head=4)
    with pytest.raises(ModelRefused, match="AttentionInterface"):
        adopt(model, Path())


def test_rope_that_depends_on_the_batch_is_refused_beyond_its_original_length():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = tiny("llama", rope_parameters=rope, max_position_embeddings=64)
    with pytest.raises(ModelRefused, match="max_model_len to at most 64"):
        adopt(model, Path(), max_model_len=65)
    assert adopt(model, Path(), max_model_len=64).max_model_len == 64


def test_the_self_test_sees_state_that_nobody_declared():
    """A model that leaks one step's activations into the next computes nonsense in a ragged batch."""

    class Leaky(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner
            self.memory = None

        def forward(self, hidden):
            out = self.inner(hidden)
            leak = 0 if self.memory is None else self.memory
            self.memory = out.mean(dim=1, keepdim=True)
            return out + leak

    module = tiny("llama")
    module.model.layers[0].mlp = Leaky(module.model.layers[0].mlp)
    model = adopt(module, Path())
    backend = choose("reference", model.device, model.dtype, model.layers, block_size=8)
    expected = selftest.expect(model)
    with pytest.raises(ModelRefused, match="differ from a plain forward"):
        selftest.check(model, backend, 8, expected)


def test_directories_that_hold_no_model(tmp_path):
    with pytest.raises(ModelRefused, match=r"config\.json"):
        load(str(tmp_path), "float32", "cpu")


def test_pickled_weights_are_never_loaded(tmp_path):
    model = tiny("llama")
    save(model, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelRefused, match=r"no \*\.safetensors; other formats, such as pickles, can run code"):
        load(str(tmp_path), "float32", "cpu")


def test_code_beside_the_weights_is_never_run(tmp_path):
    """Neither for an architecture that transformers knows, nor for one it doesn't."""
    save(tiny("llama"), tmp_path)
    proof = tmp_path / "proof"
    for name in ("configuration", "modeling", "tokenization"):
        (tmp_path / f"{name}_own.py").write_text(f"open({str(proof)!r}, 'w')\n")
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["tokenization_own.Own", null]}}')
    load(str(tmp_path), "float32", "cpu")
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "own"}))
    with pytest.raises(ValueError, match="trust_remote_code"):
        load(str(tmp_path), "float32", "cpu")
    with pytest.raises(ValueError, match="tokenizer"):
        Chat(str(tmp_path))
    assert not proof.exists()
