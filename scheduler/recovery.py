"""After a start, or another replica's end: what another process accepted goes on from its journalled tokens."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from protocol.errors import BadRequest, ServiceError
from scheduler.admission import Admission
from scheduler.core.sequence import Sequence
from scheduler.journal.entry import Entry, Journal
from scheduler.loop import Engine
from scheduler.mqtt.delivery import Delivery
from scheduler.mqtt.egress import Egress

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Recovery:
    """``attempts``: from this many processes on a request may be what killed them, and is first run alone; it is
    quarantined once so many died during that."""

    journal: Journal
    engine: Engine
    admission: Admission
    delivery: Delivery
    egress: Egress
    model: str
    attempts: int

    async def run(self) -> None:
        """Take up everything unfinished; nothing new may begin before this is done, for suspects must be alone."""
        entries = self.journal.unfinished()
        if entries:
            logger.info("taking up what an earlier process accepted", extra={"requests": len(entries)})
        await self.take_up(entries)

    async def take_up(self, entries: Iterable[Entry]) -> None:
        """Go on with these, suspects one at a time, though beside what runs already."""
        running = []
        for entry in entries:
            if entry.reply is not None:
                self.delivery.resume(entry)
            elif entry.model != self.model:
                detail = f"{entry.model} is no longer served here, {self.model} is"
                self.egress.abandon(entry, BadRequest("model", detail, "model_not_found").body)
            elif entry.trials >= self.attempts:
                self._quarantine(entry)
            else:
                running.append(entry)
        # Every process counts, whatever ended it, so this only says whom to look at first.
        suspects = [entry for entry in running if entry.attempt > self.attempts]
        passed = [(entry.id, await self._try_alone(entry)) for entry in suspects]
        for id, sequences in passed:
            # Its deadline may have passed during the others' trials.
            if sequences and id in self.egress:
                self.engine.submit(*(sequence.again() for sequence in sequences))
        for entry in running:
            if entry.attempt <= self.attempts:
                self._begin(entry)

    async def _try_alone(self, entry: Entry) -> list[Sequence]:
        """Run it up to its next token and take it out again, for the next one must be alone too; nothing when it has ended."""
        await self.journal.trial(entry.id, begins=True)
        self._begin(entry)
        await self.egress.wait_for_token(entry.id)
        sequences = self.egress.take_out(entry.id)
        await self.journal.trial(entry.id, begins=False)
        return sequences

    def _begin(self, entry: Entry) -> None:
        self.admission.enter_anyway(entry)
        self.egress.begin(entry)

    def _quarantine(self, entry: Entry) -> None:
        reason = f"the service died {entry.trials} times while this request ran alone"
        self.delivery.quarantine(entry, reason, entry.trials)
        self.egress.abandon(entry, ServiceError("quarantined", reason).body)
