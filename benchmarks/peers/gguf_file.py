"""A Llama model of safetensors as a GGUF file, for peers that read nothing else."""

import json
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
from safetensors import safe_open
from tokenizers import Tokenizer

from benchmarks.peers.failure import PeerFailed

GgufType = Literal["F32", "F16"]


def write(model: Path, kind: GgufType, target: Path) -> None:
    """Matrices are written in ``kind``, vectors as float32. Raises PeerFailed for what isn't a plain Llama."""
    config = json.loads((model / "config.json").read_text())
    rope = config.get("rope_parameters") or {}
    if config["model_type"] != "llama" or rope.get("rope_type") != "default" or config["attention_bias"]:
        raise PeerFailed("a GGUF file is made of plain Llama models only")
    writer = gguf.GGUFWriter(target, "llama")
    _shape(writer, config, rope["rope_theta"])
    _vocabulary(writer, model, config["vocab_size"])
    writer.add_file_type(getattr(gguf.LlamaFileType, f"{'ALL' if kind == 'F32' else 'MOSTLY'}_{kind}"))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, "np") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                tensor = tensors.get_tensor(name).astype(np.float32)
                if (projection := name.split(".")[-2]) in heads:
                    tensor = _interleaved(tensor, heads[projection])
                if kind == "F16" and tensor.ndim > 1:
                    tensor = tensor.astype(np.float16)
                written = names.get_name(name, try_suffixes=(".weight",))
                if written is None:
                    raise PeerFailed(f"GGUF's llama has no tensor {name}")
                writer.add_tensor(written, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _shape(writer: gguf.GGUFWriter, config: dict[str, Any], rope_theta: float) -> None:
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(rope_theta)


def _vocabulary(writer: gguf.GGUFWriter, model: Path, size: int) -> None:
    """Only ids cross to a peer, but it refuses a file without these; how text is split before BPE is not among them."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    special = {id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([tokenizer.id_to_token(id) or f"<unused {id}>" for id in range(size)])
    writer.add_token_types([gguf.TokenType.CONTROL if id in special else gguf.TokenType.NORMAL for id in range(size)])
    gguf.SpecialVocab(model, load_merges=True, n_vocab=size).add_to_gguf(writer, quiet=True)


def _interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """``[heads * head_dim, in]``: the rotary halves of each head, which GGUF's llama expects in pairs."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
