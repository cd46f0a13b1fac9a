"""Agent, trainer and broker as services of a machine: their units, and whose state a command is about."""

__all__ = ["install", "state_choice", "systemd"]
