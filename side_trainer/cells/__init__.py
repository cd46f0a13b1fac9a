"""Trainers of several brokers that make every update together: how they meet, and decide what is next."""

__all__ = ["gradients", "group", "steps", "torch_group"]
