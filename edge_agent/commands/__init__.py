"""``sidestream agent``: run it, set it up, label, predict, generate."""

__all__ = ["agent"]
