"""The batcher of the service on a virtual clock: arrivals from a trace or a generator, a cost model instead of a worker."""
