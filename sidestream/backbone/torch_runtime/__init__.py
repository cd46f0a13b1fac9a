"""The frozen model in torch and transformers."""

__all__ = ["export", "runtime", "tuned"]
