"""Which labels a tenant's series carry, so that their number doesn't grow with who comes."""

from collections.abc import Mapping

OTHER = "other"
_TIER = "default"


class Labels:
    """The first ``most`` tenants that the configuration names have a label of their own and keep it; all others share one."""

    def __init__(self, tiers: Mapping[str, str], most: int) -> None:
        self._most = most
        self._named: dict[str, None] = {}
        self.take(tiers)

    def take(self, tiers: Mapping[str, str]) -> None:
        """From now on these tenants are named, and of these tiers."""
        self._tiers = dict(tiers)
        for name in tiers:
            if len(self._named) < self._most:
                self._named[name] = None

    @property
    def tenants(self) -> tuple[str, ...]:
        """Every label there is for a tenant."""
        return (*self._named, OTHER)

    def tenant(self, name: str) -> str:
        return name if name in self._named else OTHER

    def tier(self, name: str) -> str:
        return self._tiers.get(name, _TIER)
