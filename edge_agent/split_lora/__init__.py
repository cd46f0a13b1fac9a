"""Split federated LoRA on the device: its layers' states go up, gradients come down, what they mean goes up."""

__all__ = ["method"]
