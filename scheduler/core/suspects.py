"""Finding the one sequence that makes a step fail: halve, try the halves one after the other, clear whoever gets past it."""


class Suspects:
    """A stack of groups, each a map from sequence id to the length it must be computed to before it is cleared.

    Only the topmost group may run; while there is none, everybody may.
    """

    def __init__(self) -> None:
        self._groups: list[dict[str, int]] = []

    def __bool__(self) -> bool:
        return bool(self._groups)

    def may_run(self, id: str) -> bool:
        return not self._groups or id in self._groups[-1]

    def accuse(self, marks: dict[str, int]) -> None:
        """A step with these failed that would have computed each of them up to its mark."""
        group = self._groups.pop() if self._groups else {}
        ids = list(marks)
        middle = -(-len(ids) // 2)
        rest = {id: mark for id, mark in group.items() if id not in marks}
        halves = [{id: marks[id] for id in half} for half in (ids[middle:], ids[:middle])]
        self._groups += [part for part in (rest, *halves) if part]

    def clear(self, id: str, computed: int) -> bool:
        """A step passed that computed a sequence this far; says whether that cleared it."""
        if not self._groups or computed < self._groups[-1].get(id, computed + 1):
            return False
        self._discard(self._groups[-1], id)
        return True

    def forget(self, id: str) -> None:
        """The sequence is gone."""
        for group in self._groups:
            if id in group:
                self._discard(group, id)
                return

    def _discard(self, group: dict[str, int], id: str) -> None:
        del group[id]
        if not group:
            self._groups.remove(group)
