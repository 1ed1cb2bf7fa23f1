"""Loads a causal language model of transformers, and refuses those that a ragged paged batch would serve wrongly."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from protocol.plan import MODEL_DEFAULTS, Sampling
from workers.attention import Attributes, LayerShape
from workers.bridge import NAME, attending
from workers.hidden import HiddenStates
from workers.weights import DEMO, demo_model

_KNOWN_LAYER_TYPES = {"full_attention", "sliding_attention"}
#: These rescale their frequencies by the longest position in the batch: one request's length would change another's text.
_BATCH_DEPENDENT_ROPE = {"dynamic", "longrope"}


class ModelRefused(Exception):
    """The model can't be served correctly; the text says why."""


@dataclass(frozen=True, slots=True)
class Model:
    """A model that passed the checks, and what its attention layers were seen to ask for. ``kv_dtype``: what keys and values are
    held as."""

    module: PreTrainedModel
    path: Path
    layers: list[LayerShape]
    attributes: list[Attributes]
    kv_dtype: torch.dtype
    max_model_len: int
    vocab_size: int
    hidden: HiddenStates
    eos_ids: list[int]
    sampling: Sampling

    @property
    def device(self) -> torch.device:
        return self.module.device

    @property
    def dtype(self) -> torch.dtype:
        return self.module.dtype


def load(name: str, dtype: str, device: str, max_model_len: int | None = None) -> Model:
    """Load the demo model or a local directory of safetensors. Raises ModelRefused, WeightsError."""
    path = path_of(name)
    if not (path / "config.json").is_file():
        raise ModelRefused(f"{path} holds no config.json: give a directory saved by transformers, or {DEMO!r}")
    if not any(path.glob("*.safetensors")):
        raise ModelRefused(
            f"{path} holds no *.safetensors; other formats, such as pickles, can run code when they are read"
        )
    # Nor is code of the directory's own ever run.
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    check_config(config, max_model_len)
    module: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, use_safetensors=True, trust_remote_code=False)
    return adopt(module.to(device), path, max_model_len)


def path_of(name: str) -> Path:
    """Where a model's files are; the demo model's are fetched when they aren't there. Raises WeightsError."""
    return demo_model() if name == DEMO else Path(name)


def adopt(module: PreTrainedModel, path: Path, max_model_len: int | None = None) -> Model:
    """Take over a loaded model: check it, route its attention through us, learn its layers' shapes. Raises ModelRefused."""
    config = module.config.get_text_config()
    check_config(module.config, max_model_len)
    if module._is_stateful:  # noqa: SLF001 - transformers' own mark, without a public name
        raise ModelRefused(f"{config.model_type} keeps recurrent state per sequence besides keys and values")
    module.eval().requires_grad_(False)
    module.set_attn_implementation(NAME)
    if module.config._attn_implementation != NAME:  # noqa: SLF001 - set_attn_implementation only warns
        raise ModelRefused(f"{config.model_type} does not route its attention through AttentionInterface")
    hidden = HiddenStates(module)
    layers, attributes = _probe(module, hidden)
    longest = config.max_position_embeddings
    eos = module.generation_config.eos_token_id if module.generation_config else config.eos_token_id
    return Model(
        module=module,
        path=path,
        layers=layers,
        attributes=attributes,
        kv_dtype=module.dtype,
        max_model_len=min(longest, max_model_len or longest),
        vocab_size=config.vocab_size,
        hidden=hidden,
        eos_ids=[] if eos is None else [eos] if isinstance(eos, int) else list(eos),
        sampling=_sampling(module.generation_config),
    )


def _sampling(config: GenerationConfig | None) -> Sampling:
    """What generation_config.json says of how tokens are drawn, and for the rest OpenAI's defaults: 1, and everything kept."""
    given = {name: value for name in MODEL_DEFAULTS if (value := getattr(config, name, None)) is not None}
    return msgspec.structs.replace(Sampling(temperature=1.0), **given)


def check_config(config: PreTrainedConfig, max_model_len: int | None) -> None:
    """Refuse what is known to go wrong, by configuration alone. Raises ModelRefused."""
    text = config.get_text_config()
    kind = text.model_type
    if config.is_encoder_decoder:
        raise ModelRefused(f"{kind} is an encoder-decoder model; only decoder-only models are served")
    unknown = set(getattr(text, "layer_types", None) or ()) - _KNOWN_LAYER_TYPES
    if unknown:
        raise ModelRefused(f"{kind} has layers of type {', '.join(sorted(unknown))}, which a paged KV cache can't hold")
    for rope in _ropes(text):
        original = rope.get("original_max_position_embeddings") or text.max_position_embeddings
        within = max_model_len is not None and max_model_len <= original
        if rope.get("rope_type") in _BATCH_DEPENDENT_ROPE and not within:
            raise ModelRefused(
                f"{kind} rescales its rotary embedding by the longest sequence in the batch ({rope['rope_type']}); "
                f"set max_model_len to at most {original} to serve it"
            )


def _ropes(text: PreTrainedConfig) -> list[dict[str, Any]]:
    """The rotary embeddings' parameters: one set, or one per layer type."""
    rope = getattr(text, "rope_parameters", None) or {}
    return [rope] if "rope_type" in rope else [each for each in rope.values() if isinstance(each, dict)]


class _Probe:
    """Stands in for attention once, to see what every layer hands over."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[LayerShape, Attributes]] = {}

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, attributes: Attributes) -> Tensor:
        shape = LayerShape(query.shape[1], key.shape[1], key.shape[2], value.shape[2])
        self.seen[layer] = (shape, attributes)
        return value.repeat_interleave(shape.query_heads // shape.kv_heads, dim=1)


def _probe(module: PreTrainedModel, hidden: HiddenStates) -> tuple[list[LayerShape], list[Attributes]]:
    probe = _Probe()
    ids = torch.zeros(1, 2, dtype=torch.int64, device=module.device)
    with torch.inference_mode(), attending(probe):
        output = module(input_ids=ids, position_ids=torch.arange(2, device=module.device)[None], use_cache=False)
    expected = module.config.get_text_config().num_hidden_layers
    if sorted(probe.seen) != list(range(expected)):
        raise ModelRefused(
            f"{module.config.model_type}: {len(probe.seen)} of {expected} layers called AttentionInterface; "
            "the others would keep no keys and values"
        )
    _check_head(hidden, output.logits[0])
    seen = [probe.seen[layer] for layer in range(expected)]
    return [shape for shape, _ in seen], [attributes for _, attributes in seen]


@torch.inference_mode()
def _check_head(hidden: HiddenStates, logits: Tensor) -> None:
    """What embeddings and scores rely on: nothing but its decoder's output makes a model's logits. Raises ModelRefused."""
    try:
        same = torch.allclose(hidden.logits(hidden.newest()), logits)
    except (AttributeError, TypeError, RuntimeError):
        same = False
    if not same:
        raise ModelRefused("the model's logits aren't made of its decoder's last hidden states alone")
