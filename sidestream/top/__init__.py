"""``sidestream top``: the fleet in a terminal, as its public topics tell it."""

__all__ = ["cli", "watch"]
