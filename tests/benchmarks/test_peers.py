"""Peers that need no other environment than ours really run; those that fail, or do other work, are reported and left out."""

import subprocess
import sys

import msgspec
import pytest
import torch
from click.testing import CliRunner
from tokenizers import Tokenizer
from tokenizers.models import BPE

from benchmarks import report
from benchmarks.peers import gguf_file, rounds
from benchmarks.peers.__main__ import main
from benchmarks.peers.catalogue import PEERS, Peer
from benchmarks.peers.environment import Environment
from benchmarks.peers.failure import PeerFailed
from benchmarks.peers.figures import PeersFigures, Spread, summarize
from benchmarks.peers.foreign import Foreign
from benchmarks.peers.job import Answer, Item, Job, Output
from benchmarks.workload import load, mixed
from tests.workers.models import save, tiny

pytestmark = pytest.mark.timeout(240)

ITEMS = [Item(0, [1, 2, 3], 8), Item(1, [4, 5], 1)]
DONE = {0: Output(3, [7] * 8), 1: Output(2, [7])}
SHORT = {0: Output(3, [7]), 1: Output(2, [7])}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save(tiny("llama"), tmp_path_factory.mktemp("model"))


def test_all_do_the_same_work_and_are_compared_with_ours_on_it(model, tmp_path):
    workload, picture = tmp_path / "workload.json", tmp_path / "peers.png"
    workload.write_bytes(msgspec.json.encode(mixed(5, prompt=(3, 12), output=(4, 9), seed=2, vocab=97)))
    command = [sys.executable, "-m", "scheduler.cli", "bench", "peers", "--json", "--plot", str(picture)]
    sizes = ("--model", str(model), "--max-running", "4", "--threads", "1", "--rounds", "1")
    wanted = ("--peers", "transformers-generate")
    done = subprocess.run([*command, "--workload", str(workload), *sizes, *wanted], check=True, stdout=subprocess.PIPE)
    figures = msgspec.json.decode(done.stdout, type=PeersFigures)
    assert [(peer.name, peer.error) for peer in figures.peers] == [
        ("ours", None),
        ("transformers-generate", None),
    ]
    items = load(workload).requests
    for peer in figures.peers:
        assert peer.requests == 5
        assert peer.prompt_tokens == sum(len(item.prompt_token_ids) for item in items)
        assert peer.output_tokens == sum(item.max_tokens for item in items)
        assert len(peer.seconds) == 1
        assert peer.output_tokens_per_s.median == peer.output_tokens / peer.seconds[0]
        assert peer.versions["torch"]
        assert peer.equal_requests == 5
    ours, generated = figures.peers
    assert ours.ours_over == 1
    assert generated.ours_over == ours.output_tokens_per_s.median / generated.output_tokens_per_s.median
    assert picture.read_bytes().startswith(b"\x89PNG")


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
    done = CliRunner().invoke(main, ["--workload", str(tmp_path / "workload.json"), option, value])
    assert done.exit_code == 2
    assert reason in done.stderr


def test_whoever_ours_is_compared_with_there_are_figures_of_ours_on_the_same_requests():
    names = ["openvino-default", "vllm"]
    entries = rounds.entries(PEERS, names, Job("", 1, 2, ITEMS), {"vllm": 2})
    assert [(entry.name, entry.shortened) for entry in entries] == [
        ("ours", 1),
        ("ours-int8", 1),
        ("openvino-default", 1),
        ("ours", 2),
        ("vllm", 2),
    ]
    assert [item.max_tokens for item in entries[-1].job.items] == [4, 1]
    prompts = {tuple(item.prompt_token_ids) for item in ITEMS}
    assert not prompts & {tuple(item.prompt_token_ids) for item in entries[0].job.warmup}


class Scripted:
    """Answers in turn what it is given, and notes its name when it is asked."""

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


def run_scripted(count: int, shortened: dict[str, int] | None = None, **answers: list[Answer | PeerFailed]):
    """Who was asked, in turn, and what came of it."""
    log: list[str] = []
    peers = {name: Peer(f"the {name} one", Scripted(name, log, *scripted)) for name, scripted in answers.items()}
    entries = rounds.entries(peers, list(peers), Job("", 1, 2, ITEMS), shortened or {})
    rounds.measure(entries, count, lambda _: None)
    return log, summarize(entries)


def test_rounds_alternate_and_their_medians_are_compared():
    log, (ours, other) = run_scripted(
        3, ours=[Answer(seconds, DONE) for seconds in (1, 2, 3)], other=[Answer(seconds, DONE) for seconds in (3, 9, 6)]
    )
    assert log == ["ours", "other", "other", "ours", "ours", "other"]
    assert ours.output_tokens_per_s == Spread(4.5, 3, 9)
    assert other.seconds == [3, 9, 6]
    assert other.ours_over == 3


def test_who_fails_is_reported_and_the_others_go_on():
    failing, fine = [Answer(1, DONE), PeerFailed("it broke")], [Answer(1, DONE)] * 3
    log, (_, other, third) = run_scripted(3, ours=fine, other=failing, third=fine)
    assert log == ["ours", "other", "third", "third", "other", "ours", "ours", "third"]
    assert (other.error, other.seconds) == ("it broke", [1])
    assert (third.error, third.seconds) == (None, [1, 1, 1])


def test_without_figures_of_ours_there_is_nothing_to_compare():
    _, (ours, other) = run_scripted(1, ours=[PeerFailed("no")], other=[Answer(1, DONE)])
    assert other.output_tokens_per_s == Spread(9, 9, 9)
    assert other.ours_over is other.equal_requests is ours.output_tokens_per_s is None


def test_requests_with_other_tokens_are_counted():
    _, (_, other) = run_scripted(1, ours=[Answer(1, DONE)], other=[Answer(1, DONE | {1: Output(2, [8])})])
    assert other.equal_requests == 1


def test_the_table_says_what_was_shortened_and_who_did_not_run():
    _, peers = run_scripted(
        1,
        {"slow": 8},
        ours=[Answer(1, DONE, {"tokenbus": "0.1"}), Answer(1, SHORT, {"tokenbus": "0.1"})],
        slow=[Answer(5, SHORT, {"slow": "7.0", "torch": "2"})],
        failing=[PeerFailed("it broke")],
    )
    lines = report.peers_text(PeersFigures("a processor", 1, 2, 1, peers)).splitlines()
    assert lines[4:8] == [
        "| the ours one | 0.1 | 9.0 | 9.0 to 9.0 |  | 2 of 2 |",
        "| the ours one, outputs 1/8 as long | 0.1 | 2.0 | 2.0 to 2.0 |  | 2 of 2 |",
        "| the slow one, outputs 1/8 as long | 7.0 | 0.4 | 0.4 to 0.4 | 5.00x | 2 of 2 |",
        "| the failing one |  | did not run |  |  |  |",
    ]
    assert lines[-1].startswith("2 requests at once, 5 prompt and 9 output tokens, greedy; a processor, 1 threads each")


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


def test_a_package_that_is_not_there_fails_its_peer(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    environment = Environment("absent", ("tokenbus-absent==0.0.1",))
    with pytest.raises(PeerFailed, match=r"(?s)pip install failed: .*tokenbus-absent==0\.0\.1"):
        Foreign("vllm", environment).install()


def test_a_driver_that_fails_says_why(model):
    with pytest.raises(PeerFailed, match=r"(?s)ended with status 1: .*No module named 'vllm'"):
        Foreign("vllm").run(Job(str(model), 1, 2, ITEMS))


def test_a_gguf_file_holds_the_same_model(model, tmp_path):
    from transformers import AutoModelForCausalLM

    Tokenizer(BPE({str(id): id for id in range(97)}, [])).save(str(model / "tokenizer.json"))
    gguf_file.write(model, "F32", tmp_path / "model.gguf")
    written = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype="float32")
    ids = torch.tensor([[5, 9, 60, 2, 41]])
    assert torch.equal(read(ids).logits, written(ids).logits)


def test_only_plain_llamas_become_gguf(tmp_path):
    folder = save(tiny("qwen2"), tmp_path / "model")
    with pytest.raises(PeerFailed, match="plain Llama models only"):
        gguf_file.write(folder, "F32", tmp_path / "model.gguf")
