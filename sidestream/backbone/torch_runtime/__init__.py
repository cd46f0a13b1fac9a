"""The frozen model in torch and transformers."""

__all__ = ["backbone", "language_model", "tuned"]
