"""Fed MobiLLM and MobiLLM: a side-network beside frozen backbones, learnt from activations sent once."""

__all__ = ["method", "output_heads", "training_rows"]
