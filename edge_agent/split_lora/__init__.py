"""Split federated LoRA on the device: its layers' states go up, gradients come down."""

__all__ = ["method", "reading", "whole"]
