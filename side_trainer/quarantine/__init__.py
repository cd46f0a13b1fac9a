"""Devices that send valid nonsense: how they are found, and what becomes of their batches."""

__all__ = ["judge", "quarantine"]
