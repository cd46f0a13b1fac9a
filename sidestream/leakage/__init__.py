"""`sidestream leakage`: how much of the text an upload reveals, by attacks on it, and what defences cost."""

__all__ = ["cli"]
