"""From samples and activations to messages."""

__all__ = ["batch_maker", "coded", "late_labels", "producer", "rungs", "targets", "token_maker"]
