"""The way to the trainer: what is known of it, what is under way on it, and what goes next. No torch."""

__all__ = ["in_flight", "link_state", "sender"]
