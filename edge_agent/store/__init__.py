"""What the device keeps on disk: outbox, streams, unlabelled samples; and its byte budgets. No torch."""

__all__ = ["budget", "outbox", "outbox_file", "streams", "unlabelled"]
