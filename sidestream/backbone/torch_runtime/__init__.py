"""The frozen model in torch and transformers."""

__all__ = ["backbone", "export", "language_model", "runtime", "tuned"]
