"""Split federated LoRA: one whole model on the trainer, its first layers on the devices, batches answered."""

__all__ = ["frozen", "method", "settling", "whole_model"]
