"""The operator's console: a page beside /metrics, the same in a terminal, and what both of them show."""
