"""A step in the making, then in flight: the plan that the worker gets, and whose its parts are."""

from dataclasses import dataclass, field

from protocol.plan import Admission, Row, StepPlan, Verification, Work
from scheduler.core.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Speculator:
    """Whose a verification is, the blocks that it had then, and at most how many positions were computed before."""

    sequence: Sequence
    blocks: list[int]
    start: int


@dataclass(slots=True)
class Draft:
    """A step in the making, then in flight. ``decoders``: whose the ``decodes`` are; ``owners``: whose each row is, and the
    blocks that it had then; ``speculators``: whose the ``verifications`` are; ``samplers``: whose each sampled token will be.
    ``drafted``: tokens that each verification may have drafted, then has. ``prefills``: whose prompts this step completes and who
    want no more; once it is applied, who ended by it.

    ``context``: how many positions the decodes see. ``prefilled``: tokens of prompts. ``started``: who runs for the first time.
    ``copies``: from block to block, before anything is computed; ``copiers``: for whom, and the blocks that they had then.
    """

    step: int
    budget: int
    admissions: list[Admission] = field(default_factory=list)
    decodes: list[int] = field(default_factory=list)
    decoders: list[Sequence] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    owners: list[tuple[Sequence, list[int]]] = field(default_factory=list)
    verifications: list[Verification] = field(default_factory=list)
    speculators: list[Speculator] = field(default_factory=list)
    drafted: list[int] = field(default_factory=list)
    samplers: list[Sequence] = field(default_factory=list)
    prefills: list[Sequence] = field(default_factory=list)
    started: list[Sequence] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    copiers: list[tuple[Sequence, list[int]]] = field(default_factory=list)
    context: int = 0
    prefilled: int = 0

    def __bool__(self) -> bool:
        return bool(self.decodes or self.rows or self.verifications)

    @property
    def plan(self) -> StepPlan:
        return StepPlan(self.step, self.admissions, self.decodes, self.rows, self.verifications, self.copies)

    @property
    def tokens(self) -> int:
        """How many are computed."""
        return len(self.decodes) + sum(row.length for row in self.rows) + len(self.drafted) + sum(self.drafted)

    @property
    def work(self) -> Work:
        starts = [row.start for row in self.rows] + [speculator.start for speculator in self.speculators]
        lengths = [row.length for row in self.rows] + [1 + drafted for drafted in self.drafted]
        context = self.context + sum(starts) + sum(lengths)
        # The last token of each row sees its whole context; those before it, less and less.
        rest = sum(
            (length - 1) * (2 * start + length) for start, length in zip(starts, lengths, strict=True) if length > 1
        )
        return Work(len(self.decodes) + len(starts), self.tokens, context, context + rest // 2)

    @property
    def ids(self) -> tuple[str, ...]:
        """Whose its decodes, rows and verifications are."""
        return tuple(
            [sequence.id for sequence in self.decoders]
            + [owner.id for owner, _ in self.owners]
            + [speculator.sequence.id for speculator in self.speculators]
        )

    @property
    def starts(self) -> dict[str, int]:
        """Who runs for the first time, and how many tokens of its prompt the prefix cache spares."""
        return {sequence.id: sequence.cached for sequence in self.started}

    def first_scored(self, row: int) -> int:
        """Which position of a prompt is the first that one of the rows scores."""
        return max(self.rows[row].start + 1, self.owners[row][0].sampling.score_from)

    def ends(self) -> list[tuple[Sequence, int]]:
        """Up to where it computes each sequence at least, as long as it is the oldest in flight."""
        decoders = self.decoders + [speculator.sequence for speculator in self.speculators]
        return [(sequence, len(sequence.tokens)) for sequence in decoders] + [
            (sequence, row.start + row.length) for (sequence, _), row in zip(self.owners, self.rows, strict=True)
        ]
