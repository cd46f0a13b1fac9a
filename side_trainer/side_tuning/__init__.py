"""Fed MobiLLM and MobiLLM: a side-network beside frozen backbones, learnt from activations sent once."""

__all__ = ["in_cells", "method", "objectives", "output_heads", "token_loss"]
