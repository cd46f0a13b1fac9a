"""The agent in a job: one stay after another, each connected and under one plan."""

__all__ = ["agent", "machine"]
