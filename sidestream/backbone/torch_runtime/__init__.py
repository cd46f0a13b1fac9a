"""The frozen model in torch and transformers."""

__all__ = ["runtime", "tuned"]
