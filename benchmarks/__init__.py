"""Measurements; each prints a table, or JSON with ``--json``. Run as ``tokenbus bench NAME`` or ``python -m benchmarks.NAME``."""
