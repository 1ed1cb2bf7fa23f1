"""Which backend serves which model, and what is said when it is not the one hoped for."""

import logging

import pytest
import torch

from tests.workers.attention.histories import CPU
from workers.attention import Attributes, LayerShape, choose
from workers.attention.cpu import CpuAttention
from workers.attention.cuda import CudaAttention
from workers.attention.reference import ReferenceAttention

LAYERS = [LayerShape(query_heads=4, kv_heads=2, key_dim=16, value_dim=16)]
ODD = [LayerShape(query_heads=4, kv_heads=2, key_dim=20, value_dim=20)]


def test_float32_on_the_cpu_takes_the_compiled_kernel():
    assert choose("auto", CPU, torch.float32, LAYERS) is CpuAttention


@pytest.mark.parametrize(
    ("dtype", "layers", "block_size", "reason"),
    [
        (torch.bfloat16, LAYERS, 16, "float32"),
        (torch.float32, ODD, 16, "multiples of 8"),
        (torch.float32, LAYERS, 12, "multiples of 8"),
    ],
)
def test_what_the_kernel_cannot_do_falls_to_the_reference_with_one_line(caplog, dtype, layers, block_size, reason):
    with caplog.at_level(logging.INFO):
        assert choose("auto", CPU, dtype, layers, block_size=block_size) is ReferenceAttention
    assert [reason in record.getMessage() for record in caplog.records] == [True]


def test_keys_and_values_may_be_held_in_half_precision(caplog):
    assert choose("auto", CPU, torch.float32, LAYERS, kv_dtype=torch.float16) is CpuAttention
    assert choose("auto", CPU, torch.float32, LAYERS, kv_dtype=torch.bfloat16) is ReferenceAttention
    assert "float32 or float16, not torch.bfloat16" in caplog.text


def test_without_a_compiler_the_reference_serves(caplog, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert choose("auto", CPU, torch.float32, LAYERS) is ReferenceAttention
    assert "no C++ compiler" in caplog.text


def test_a_backend_asked_for_by_name_is_never_silently_another():
    assert choose("reference", CPU, torch.float32, LAYERS) is ReferenceAttention
    with pytest.raises(ValueError, match="CUDA device"):
        choose("cuda", CPU, torch.bfloat16, LAYERS)
    with pytest.raises(ValueError, match="float32"):
        choose("cpu", CPU, torch.float16, LAYERS)


@pytest.mark.gpu
def test_a_cuda_device_takes_its_own_kernel():
    cuda, attributes = torch.device("cuda"), [Attributes(1.0, softcap=30.0, sinks=torch.zeros(4))]
    large = [LayerShape(query_heads=4, kv_heads=2, key_dim=512, value_dim=16)]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert choose("auto", cuda, dtype, ODD, block_size=12, attributes=attributes) is CudaAttention
    assert choose("auto", cuda, torch.bfloat16, large) is ReferenceAttention
