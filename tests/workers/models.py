"""Tiny random-weight models of many architectures, each with the feature that makes it worth testing."""

import shutil
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from workers.weights import demo_model

_COMMON = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
#: What has more norms than one before each part.
_NORMS = {"qwen3", "qwen3_moe", "gemma2", "gemma3_text", "olmo2"}
_LOCAL = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6}

SERVED: dict[str, dict] = {
    "llama": {},
    "mistral": {"sliding_window": 6},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": {**_EXPERTS, "decoder_sparse_step": 1},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma2": {**_LOCAL, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {**_LOCAL, "query_pre_attn_scalar": 8},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 256},
    "phi3": {},
    "olmo2": {},
    "gpt_oss": {**_LOCAL, "num_local_experts": 4, "num_experts_per_tok": 2},
}

REFUSED: dict[str, dict] = {
    "mamba": {},
    "jamba": {
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 4,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"],
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 4,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "shared_intermediate_size": 16,
    },
}


def tiny(kind: str, **overrides) -> PreTrainedModel:
    """A model of this architecture with seeded random weights, float32, in eval mode."""
    features = SERVED.get(kind, REFUSED.get(kind, {}))
    config = AutoConfig.for_model(kind, **{**_COMMON, **features, **overrides})
    torch.manual_seed(11)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    if kind in _NORMS:  # all the same, as they begin, would hide which is whose
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.data += torch.empty_like(parameter).uniform_(-0.5, 0.5)
    if kind == "gpt_oss":  # transformers leaves these uninitialised or zero
        for name, parameter in model.named_parameters():
            if "sinks" in name or "experts" in name or "router" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    return model


def generate(model: PreTrainedModel, prompt: list[int], length: int) -> list[int]:
    """transformers' own greedy answer, of exactly ``length`` tokens."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=length,
        eos_token_id=[],
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


def save(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def servable(folder: Path, **overrides) -> Path:
    """A tiny model with the demo model's tokenizer, whose ids reach far beyond the tiny vocabulary unless it is overridden."""
    save(tiny("llama", max_position_embeddings=4096, **overrides), folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_model() / name, folder)
    return folder
