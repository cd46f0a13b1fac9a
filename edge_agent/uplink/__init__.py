"""The way to the trainer: what is known of it, under way on it, next, and within its budget."""

__all__ = ["budget", "in_flight", "link_state", "sender"]
