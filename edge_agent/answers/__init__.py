"""What a device does with what it adopted: predictions, generated text, a model for people's own tools."""

__all__ = ["answer", "predictor"]
