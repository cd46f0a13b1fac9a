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
    "side_tasks",
    "targets",
    "token_maker",
]
