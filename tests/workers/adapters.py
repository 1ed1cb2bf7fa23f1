"""Random LoRA adapters for a model, as PEFT saves them."""

import copy
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel


def adapt(base: PreTrainedModel, folder: Path, seed: int, **settings) -> PeftModel:
    """Save an adapter for a copy of ``base``; returns PEFT's own model with it."""
    torch.manual_seed(seed)
    model = get_peft_model(copy.deepcopy(base), LoraConfig(init_lora_weights=False, **settings))
    model.save_pretrained(folder)
    return model
