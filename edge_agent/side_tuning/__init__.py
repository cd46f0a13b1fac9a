"""Fed MobiLLM and MobiLLM on the device: each sample is forwarded and sent once, and nothing is trained."""

__all__ = ["method"]
