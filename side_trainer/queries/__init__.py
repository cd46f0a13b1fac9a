"""Predictions for devices of split jobs that have no room for the whole model: asked, answered in turn."""

__all__ = ["answering", "checking"]
