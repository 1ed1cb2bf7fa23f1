"""Peers that need no other environment than ours really run; those that fail, or do other work, are reported and left out."""

import json
import subprocess
import sys

import msgspec
import pytest

from benchmarks import report
from benchmarks.peers import gguf_file, rounds
from benchmarks.peers.catalogue import PEERS, Peer
from benchmarks.peers.environment import Environment
from benchmarks.peers.failure import PeerFailed
from benchmarks.peers.figures import PeersFigures, summarize
from benchmarks.peers.foreign import Foreign
from benchmarks.peers.job import Answer, Item, Job, Output
from benchmarks.peers.ours import Ours
from benchmarks.workload import load, mixed
from tests.workers.models import save, servable, tiny

pytestmark = pytest.mark.timeout(240)

ITEMS = [Item(0, [1, 2, 3], 8), Item(1, [4, 5], 1)]
DONE = {0: Output(3, [7] * 8), 1: Output(2, [7])}


def bench(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "scheduler.cli", "bench", "peers", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save(tiny("llama"), tmp_path_factory.mktemp("model"))


def test_all_do_the_same_work_and_are_compared_with_ours_on_it(model, tmp_path):
    workload, picture = tmp_path / "workload.json", tmp_path / "peers.png"
    workload.write_bytes(msgspec.json.encode(mixed(5, prompt=(3, 12), output=(4, 9), seed=2, vocab=97)))
    wanted = ("--peers", "transformers-generate,transformers-cb,ours-int8", "--shorten", "transformers-cb=4")
    done = bench(
        *("--workload", str(workload), "--model", str(model), "--max-running", "4", "--threads", "1", "--rounds", "1"),
        *(*wanted, "--json", "--plot", str(picture)),
    )
    assert done.returncode == 0, done.stderr
    figures = msgspec.json.decode(done.stdout, type=PeersFigures)
    assert [(peer.name, peer.shortened, peer.error) for peer in figures.peers] == [
        ("ours", 1, None),
        ("transformers-generate", 1, None),
        ("ours", 4, None),
        ("transformers-cb", 4, None),
        ("ours-int8", 1, None),
    ]
    items = load(workload).requests
    for peer in figures.peers:
        assert peer.requests == 5
        assert peer.prompt_tokens == sum(len(item.prompt_token_ids) for item in items)
        assert peer.output_tokens == sum(item.max_tokens // peer.shortened for item in items)
        assert len(peer.seconds) == 1
        assert peer.output_tokens_per_s.median == peer.output_tokens / peer.seconds[0]
        assert peer.versions["torch"]
        if peer.name != "ours-int8":
            assert peer.equal_requests == 5
    ours, generated = figures.peers[:2]
    assert ours.ours_over == 1
    assert generated.ours_over == ours.output_tokens_per_s.median / generated.output_tokens_per_s.median
    assert picture.read_bytes().startswith(b"\x89PNG")
    text = report.peers_text(figures)
    assert f"5 requests at once, {ours.prompt_tokens} prompt and {ours.output_tokens} output tokens" in text
    rows = [line for line in text.splitlines() if line.startswith("| transformers' continuous batching")]
    assert len(rows) == 1
    assert rows[0].startswith("| transformers' continuous batching, outputs 1/4 as long | 5.")
    assert rows[0].endswith("x | 5 of 5 |")


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [
        ("--peers", "ours,nobody", "nobody: known are ours, "),
        ("--shorten", "nobody=2", "'nobody=2' is not PEER=N"),
        ("--shorten", "vllm=0", "'vllm=0' is not PEER=N"),
        ("--shorten", "vllm", "'vllm' is not PEER=N"),
    ],
)
def test_options_that_make_no_sense_are_refused(option, value, reason, tmp_path):
    (tmp_path / "workload.json").write_text('{"requests": []}')
    done = bench("--workload", str(tmp_path / "workload.json"), option, value)
    assert done.returncode == 2
    assert reason in " ".join(done.stderr.replace("│", " ").split())


class Scripted:
    """Answers in turn what it is given, and notes that it was asked."""

    def __init__(self, name: str, log: list[str], *answers: Answer | PeerFailed) -> None:
        self._name, self._log, self._answers = name, log, list(answers)

    def install(self) -> None:
        pass

    def run(self, job: Job) -> Answer:
        self._log.append(self._name)
        answer = self._answers.pop(0)
        if isinstance(answer, PeerFailed):
            raise answer
        return answer


def run_scripted(log: list[str], count: int, **answers: list[Answer | PeerFailed]) -> dict[str, dict]:
    peers = {name: Peer(name, Scripted(name, log, *scripted)) for name, scripted in answers.items()}
    entries = rounds.entries(peers, list(peers), Job("", 1, 2, ITEMS), {})
    rounds.measure(entries, count, lambda _: None)
    return {figures.name: json.loads(msgspec.json.encode(figures)) for figures in summarize(entries)}


def test_rounds_alternate_and_their_medians_are_compared():
    log = []
    figures = run_scripted(
        log,
        3,
        ours=[Answer(seconds, DONE) for seconds in (1, 2, 3)],
        other=[Answer(seconds, DONE) for seconds in (3, 9, 6)],
    )
    assert log == ["ours", "other", "other", "ours", "ours", "other"]
    assert figures["ours"]["output_tokens_per_s"] == {"median": 4.5, "min": 3.0, "max": 9.0}
    assert figures["other"]["seconds"] == [3, 9, 6]
    assert figures["other"]["ours_over"] == 3


def test_who_fails_is_reported_and_the_others_go_on():
    log = []
    figures = run_scripted(
        log, 2, ours=[Answer(1, DONE)] * 2, other=[Answer(1, DONE), PeerFailed("it broke")], third=[Answer(1, DONE)] * 2
    )
    assert log == ["ours", "other", "third", "third", "other", "ours"]
    assert figures["other"]["error"] == "it broke"
    assert figures["other"]["seconds"] == [1]
    assert figures["third"]["error"] is None
    assert len(figures["third"]["seconds"]) == 2


def test_without_figures_of_ours_there_is_nothing_to_compare():
    figures = run_scripted([], 1, ours=[PeerFailed("no")], other=[Answer(1, DONE)])
    assert figures["other"]["output_tokens_per_s"]["median"] == 9
    assert figures["other"]["ours_over"] is figures["other"]["equal_requests"] is None
    assert figures["ours"]["output_tokens_per_s"] is None


def test_requests_with_other_tokens_are_counted():
    other = DONE | {1: Output(2, [8])}
    assert run_scripted([], 1, ours=[Answer(1, DONE)], other=[Answer(1, other)])["other"]["equal_requests"] == 1


@pytest.mark.parametrize(
    ("outputs", "reason"),
    [
        ({0: DONE[0]}, r"1 of 2 requests; of request 1 \(prompt, output\) tokens are None, not \(2, 1\)"),
        (DONE | {0: Output(3, [7] * 7)}, r"tokens are \(3, 7\), not \(3, 8\)"),
        (DONE | {0: Output(2, [7] * 8)}, r"tokens are \(2, 8\), not \(3, 8\)"),
        (DONE | {2: DONE[0]}, r"of request 2 \(prompt, output\) tokens are \(3, 8\), not None"),
    ],
)
def test_other_work_counts_as_a_failure(outputs, reason):
    with pytest.raises(PeerFailed, match=reason):
        rounds.check(ITEMS, Answer(1, outputs))


def test_a_package_that_is_not_there_fails_its_peer_and_is_tried_again(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    environment = Environment("absent", ("tokenbus-absent==0.0.1",))
    for _ in range(2):
        with pytest.raises(PeerFailed, match=r"pip install failed: [^$]*tokenbus-absent==0\.0\.1"):
            Foreign("vllm", environment).install()


def test_a_driver_that_fails_says_why(model):
    with pytest.raises(PeerFailed, match=r"ended with status 1: [^$]*OSError"):
        PEERS["transformers-generate"].engine.run(Job(str(model / "absent"), 1, 2, ITEMS))


def test_ours_that_cannot_start_says_why(model):
    with pytest.raises(PeerFailed, match="holds no config"):
        Ours("float32").run(Job(str(model / "absent"), 1, 2, ITEMS))


@pytest.mark.parametrize(("kind", "tolerance"), [("F32", 0), ("F16", 2e-3)])
def test_a_gguf_file_holds_the_same_model(kind, tolerance, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = servable(tmp_path / "model", vocab_size=49152)
    gguf_file.write(folder, kind, tmp_path / "model.gguf")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype="float32")
    assert read.config.rope_parameters["rope_theta"] == model.config.rope_parameters["rope_theta"]
    theirs = read.state_dict()
    for name, tensor in model.state_dict().items():
        assert (theirs[name] - tensor).abs().max() <= tolerance * tensor.abs().max(), name


def test_only_plain_llamas_become_gguf(tmp_path):
    folder = save(tiny("qwen2"), tmp_path / "model")
    with pytest.raises(PeerFailed, match="plain Llama models only"):
        gguf_file.write(folder, "F32", tmp_path / "model.gguf")
