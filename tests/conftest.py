import importlib.util
import os

# Before torch: two test processes share the cores, and spinning OpenMP threads would cost each other a time slice at every
# barrier (docs/decisions/0004-shared-cores.md).
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
if importlib.util.find_spec("triton"):
    import torch

    if not torch.cuda.is_available():
        # Triton reads it when it is imported, which transformers does.
        os.environ["TRITON_INTERPRET"] = "1"

import pytest

pytest_plugins = ["tests.brokers", "tests.collector", "tests.databases"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``gpu``, and no others, are skipped where there is no CUDA device."""
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
