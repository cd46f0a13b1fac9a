"""Every fact that changes the weights, in order, durable before anyone is told."""

__all__ = ["adapter_arrived", "decoded", "file", "holding", "journal", "records", "replies"]
