"""The trainer's settings: their types, what a method implies, and what is taken up without a restart."""

__all__ = ["cells", "implied", "reload", "schema", "split", "state", "tier", "tuning"]
