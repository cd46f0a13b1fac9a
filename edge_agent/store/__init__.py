"""What the device keeps on disk: outbox, streams, unlabelled samples; and its byte budgets. No torch."""
