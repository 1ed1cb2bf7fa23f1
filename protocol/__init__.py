"""What crosses a wire: tenant messages, topics, the scheduler-worker contract, and the client."""
