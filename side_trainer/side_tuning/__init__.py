"""Fed MobiLLM and MobiLLM: a side-network beside frozen backbones, learnt from activations sent once."""

__all__ = ["method", "objectives", "output_heads", "token_loss"]
