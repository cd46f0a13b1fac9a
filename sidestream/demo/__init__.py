"""A fleet on one machine: data dealt out, a broker, a trainer and crews of agents, and a report."""

__all__ = ["cli"]
