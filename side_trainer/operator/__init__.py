"""What an operator does with a trainer's state: verify, export, back up, rebuild; and the commands."""

__all__ = ["audit", "commands", "status"]
