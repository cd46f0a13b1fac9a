"""The trainer's settings: their types, what a method implies, and what is taken up without a restart."""

__all__ = ["implied", "reload", "schema", "split", "tuning"]
