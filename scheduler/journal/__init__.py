"""What was accepted and how far it is, so that nothing accepted is lost: one interface, on disk or in memory."""
