"""Has torch compile a model's layers, so that what lies between products and attention takes a few kernels instead of dozens."""

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from workers.bridge import NAME, paged_attention


def compile_layers(module: PreTrainedModel) -> None:
    """Layers are alike, so all of them take what was compiled for the first, for any number of tokens."""
    # Attention launches kernels of its own, by what the step under way is.
    AttentionInterface.register(NAME, torch.compiler.disable(paged_attention))
    for layer in module.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.compile(dynamic=True)
