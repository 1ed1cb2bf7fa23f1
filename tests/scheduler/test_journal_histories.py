"""Random histories of each durable journal against a dict."""

import asyncio
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from scheduler.journal.entry import Entry, Listener, Piece, Taken, digest
from tests.databases import emptied
from tests.scheduler.journals import Place, die, entry, opened, without_body

# Any history


class Histories(RuleBasedStateMachine):
    """Random writes, and closing or dying in between, against a dict."""

    IDS = [f"{tenant}/{name}" for tenant in ("alice", "bob") for name in "abc"]
    ids = st.sampled_from(IDS)

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.model: dict[str, Entry] = {}
        self.delivered: set[str] = set()
        self.place = self.empty()
        self.open()

    def empty(self) -> Place:
        """A place for a journal, without one."""
        raise NotImplementedError

    def die(self) -> None:
        """Leave the journal as a killed process does."""
        raise NotImplementedError

    def open(self) -> None:
        self.journal = self.run(opened(self.place).__aenter__())

    def run(self, work):
        async def awaited():
            return await work

        return self.runner.run(awaited())

    def write(self, method: str, *arguments, **named):
        async def awaited():
            return await getattr(self.journal, method)(*arguments, **named)

        return self.runner.run(awaited())

    def running(self, id: str) -> Entry | None:
        one = self.model.get(id)
        return one if one is not None and one.reply is None else None

    @rule(
        batch=st.lists(
            st.tuples(ids, st.sampled_from(["Hello", "x" * 9000]), st.none() | st.floats(0, 1e10)), max_size=4
        )
    )
    def accept(self, batch):
        expected = []
        for id, prompt, expires_at in batch:
            known = self.model.get(id)
            expected.append(known and Taken(digest("tiny", known.request), known.reply))
            self.model.setdefault(id, entry(id, prompt, accepted_at=float(len(self.model)), expires_at=expires_at))
        written = [
            entry(id, prompt, accepted_at=self.model[id].accepted_at, expires_at=expires_at)
            for id, prompt, expires_at in batch
        ]
        assert self.write("accept", written) == expected

    @rule(
        id=ids,
        tokens=st.lists(st.integers(0, 2**31 - 1), max_size=5),
        choice=st.integers(0, 2),
        finish=st.sampled_from([None, None, "stop", "length"]),
    )
    def progress(self, id, tokens, choice, finish):
        if one := self.running(id):
            piece = Piece(tokens, choice, finish)
            self.write("progress", [(id, len(one.pieces), piece)])
            one.pieces = [*one.pieces, piece]

    @rule(id=ids, listeners=st.lists(st.builds(Listener, st.text(), st.none() | st.binary()), max_size=3))
    def listen(self, id, listeners):
        if one := self.running(id):
            self.write("listen", id, listeners)
            one.listeners = listeners

    @rule(id=ids, begins=st.booleans())
    def trial(self, id, begins):
        if one := self.running(id):
            self.write("trial", id, begins=begins)
            one.trials = one.trials + 1 if begins else 0

    @rule(id=ids, reply=st.binary())
    def end(self, id, reply):
        if one := self.running(id):
            self.write("end", id, reply)
            one.reply = reply

    @rule(id=ids)
    def deliver(self, id):
        if id in self.model and self.model[id].reply is not None:
            self.write("delivered", id)
            self.delivered.add(id)

    @rule(dies=st.booleans())
    def reopen(self, dies):
        if dies:
            self.die()
        else:
            self.run(self.journal.__aexit__())
        self.open()
        left_over = [one for id, one in self.model.items() if id not in self.delivered]
        for one in left_over:
            one.attempt += 1
        assert self.journal.unfinished() == [one if one.reply is None else without_body(one) for one in left_over]

    @invariant()
    def everything_is_found(self):
        found = self.write("find", self.IDS)
        known = [self.model.get(id) for id in self.IDS]
        assert found == [one and Taken(digest("tiny", one.request), one.reply) for one in known]

    def teardown(self):
        self.run(self.journal.__aexit__())
        self.runner.close()


class OnDisk(Histories):
    def empty(self) -> Path:
        self.folder = Path(tempfile.mkdtemp())
        return self.folder / "0"

    def die(self) -> None:
        left = self.folder / str(int(self.place.name) + 1)  # what lies there now is what a killed process leaves behind
        for end in ("", "-wal"):
            shutil.copy(f"{self.place}{end}", f"{left}{end}")
        self.run(self.journal.__aexit__())
        self.place = left

    def teardown(self):
        super().teardown()
        shutil.rmtree(self.folder)


class InDatabase(Histories):
    url = ""

    def empty(self) -> str:
        return emptied(self.url)

    def die(self) -> None:
        self.run(die(self.journal))


#: Of any journal.
FEW = settings(max_examples=25, stateful_step_count=25, deadline=None)
OnDisk.TestCase.settings = FEW
InDatabase.TestCase.settings = FEW
TestOnDisk = OnDisk.TestCase


@pytest.fixture(scope="class")
def url(postgres):
    InDatabase.url = postgres


@pytest.mark.usefixtures("url")
class TestInDatabase(InDatabase.TestCase):
    pass
