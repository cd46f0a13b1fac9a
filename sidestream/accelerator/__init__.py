"""Where a model is computed: which processor or GPU, why that one, and how tensors get there and back."""

__all__ = ["choice", "providers", "torch_device"]
