"""What a device does with what it adopted: predictions and generated text."""

__all__ = ["answer", "asking", "predictor"]
