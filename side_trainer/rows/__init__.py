"""A journal's rows as the learner sees them: kept as written, numbered, learnt from in an order."""

__all__ = ["drawn_rows", "training_order", "training_rows"]
