"""From samples and activations to messages."""

__all__ = [
    "assigned",
    "batch_maker",
    "coded",
    "intake",
    "late_labels",
    "message",
    "patience",
    "producer",
    "rungs",
    "targets",
    "token_maker",
]
