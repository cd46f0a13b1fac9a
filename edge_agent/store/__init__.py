"""What the device keeps on disk and for how long: outbox, streams, unlabelled samples. No torch."""

__all__ = ["outbox", "outbox_file", "streams", "unlabelled"]
