"""Images as a backbone takes them: read from files, made RGB, scaled and normalised as the model has it."""

__all__ = ["decoding", "image_input", "scaling"]
