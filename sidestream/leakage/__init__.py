"""How much of a text an upload reveals: attacks on one's own uploads, and what each defence costs."""

__all__ = ["cli"]
