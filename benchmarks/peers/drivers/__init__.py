"""One file for each engine, run under that engine's own interpreter: they import `job`, the engine, and nothing else of ours."""
