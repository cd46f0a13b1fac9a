"""The side-network: its form, its bundle on the wire, torch that trains it, NumPy that answers with it."""

__all__ = [
    "bundle",
    "change",
    "exported",
    "form",
    "inference",
    "initial",
    "narrowing",
    "network",
    "output_head",
]
