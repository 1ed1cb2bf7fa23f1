"""Sequences with the same prompt: the choices of one request."""

from typing import TYPE_CHECKING, NamedTuple

from scheduler.core.sequence import State

if TYPE_CHECKING:
    from scheduler.core.sequence import Sequence


class PromptBlocks(NamedTuple):
    """Blocks that hold a prompt, and how often each had been handed out by then: more often, and it holds something else."""

    blocks: list[int]
    fillings: list[int]


class Family:
    """Their prompt is computed once. While the ``leader`` does so, those that wait are ``held`` outside the queue; then
    ``prompt`` says where it lies, and they fork from there.
    """

    __slots__ = ("held", "leader", "members", "prompt")

    def __init__(self, members: list["Sequence"]) -> None:
        self.members = members
        self.leader: Sequence | None = None
        self.held: list[Sequence] = []
        self.prompt: PromptBlocks | None = None

    @property
    def lives(self) -> bool:
        """Whether somebody may need the prompt again."""
        return any(member.state is not State.ENDED for member in self.members)
