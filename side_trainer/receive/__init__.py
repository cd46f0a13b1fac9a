"""What the trainer hears: the bounded inbox, checks, rates, topics that are shut out."""

__all__ = [
    "batches",
    "duties",
    "inbox",
    "refusals",
    "reports",
    "router",
    "setbacks",
    "shut_out",
    "subscriptions",
]
