"""Weights as a pure function of the journal: training rows, losses, optimiser, checkpoints."""

__all__ = ["checkpoint", "checkpointer", "fold", "progress"]
