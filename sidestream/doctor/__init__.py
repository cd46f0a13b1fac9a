"""``sidestream doctor``: what of machine, broker and settings would keep a job from running."""

__all__ = ["cli"]
