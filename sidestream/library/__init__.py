"""Sidestream from a program or a notebook: what ``import sidestream`` offers."""

__all__ = ["jobs", "models", "running"]
