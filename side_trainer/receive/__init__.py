"""What the trainer hears: the bounded inbox, checks, rates, topics that are shut out."""

__all__ = ["absence", "inbox", "refusals", "setbacks", "shut_out", "subscriptions"]
