"""The cost models that come with the package: fitted to a machine that was measured, or derived from a data sheet."""

from pathlib import Path

import msgspec

from scheduler.simulation.cost import CostError, CostModel

_FITTED = Path(__file__).with_name("fitted")


def derive(name: str, *, flops: float, bandwidth: float, parameters: float, layers: int, hidden: int) -> CostModel:
    """What a data sheet allows at 16 bits: an idealisation, nothing was measured.

    A step reads all parameters once, 2 bytes each, and multiplies each token with them, 2 operations each. Each position read
    has a key and a value of ``hidden`` numbers in every layer; each pair attended takes a product with either. ``flops`` and
    ``bandwidth`` (bytes) per second. Reading and computing are added up, as if nothing overlapped.
    """
    return CostModel(
        name=name,
        origin="derived from published specifications, not measured",
        step_s=2 * parameters / bandwidth,
        row_s=0.0,
        token_s=2 * parameters / flops,
        context_s=2 * 2 * layers * hidden / bandwidth,
        attended_s=2 * 2 * layers * hidden / flops,
    )


#: The machine of the fairness paper's synthetic workloads: NVIDIA's A10G (70 TFLOP/s dense at 16 bits, 600 GB/s) and Llama-2-7B.
#: The authors' own profile (VTC-artifact, fair_bench/cost_profile.json) has 0.213 ms per prompt token and 37.2 ms for a decode
#: step of 19 rows at 384 positions on average; this says 0.193 ms and 32.5 ms.
_DERIVED = {
    "a10g-llama-2-7b": derive(
        "a10g-llama-2-7b", flops=70e12, bandwidth=600e9, parameters=6.738e9, layers=32, hidden=4096
    )
}


def names() -> list[str]:
    return sorted([*_DERIVED, *(path.stem for path in _FITTED.glob("*.json"))])


def load(name: str) -> CostModel:
    """One of ``names()``, or a file that ``tokenbus simulate fit`` wrote. Raises CostError."""
    if name in _DERIVED:
        return _DERIVED[name]
    path = _FITTED / f"{name}.json" if name in names() else Path(name)
    try:
        return msgspec.json.decode(path.read_bytes(), type=CostModel)
    except OSError as error:
        raise CostError(
            f"no cost model {name!r} ({error.strerror}); there are {', '.join(names())}, or a file"
        ) from None
    except msgspec.DecodeError as error:
        raise CostError(f"{path} holds no cost model: {error}") from None
