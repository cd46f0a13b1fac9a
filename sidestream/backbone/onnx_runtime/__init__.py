"""The frozen model in onnxruntime, from an exported folder: without torch, and without transformers."""

__all__ = ["backbone", "folder", "runtime"]
