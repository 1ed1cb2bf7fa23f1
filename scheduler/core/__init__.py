"""The continuous-batching policy, sans-IO: no clock, no I/O, no randomness; the service, tests and benchmarks drive it alike."""
