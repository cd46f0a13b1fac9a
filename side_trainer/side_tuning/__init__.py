"""Fed MobiLLM and MobiLLM: a side-network beside frozen backbones, learnt from activations sent once."""
