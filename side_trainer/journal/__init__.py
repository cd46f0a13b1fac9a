"""Every fact that changes the weights, in order, durable before anyone is told."""

__all__ = ["decoded", "file", "holding", "journal", "records", "replies"]
