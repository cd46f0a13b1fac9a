"""Weights as a pure function of the journal: records in order, facts, checkpoints; methods do the rest."""

__all__ = ["checkpoint", "checkpointer", "fold", "processors", "progress", "retention"]
