"""A frozen transformer cut in two, LoRA on both halves: the device's first layers, the trainer's others."""

__all__ = ["adapter_bundle", "loading", "lower_half", "split_model", "tuned"]
