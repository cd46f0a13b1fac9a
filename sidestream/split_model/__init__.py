"""A frozen transformer cut in two, LoRA on both halves: the device's first layers, the trainer's others."""

__all__ = ["lower_half", "split_model", "tuned"]
