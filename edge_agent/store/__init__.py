"""What the device keeps on disk and for how long: outbox, streams, unlabelled samples."""

__all__ = ["outbox", "outbox_file", "streams", "unlabelled"]
