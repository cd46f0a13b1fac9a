"""The frozen model behind one interface that knows no runtime: tokens, taps, which vectors are sampled."""

__all__ = [
    "backbone",
    "commands",
    "language_model",
    "memory",
    "runtimes",
    "sampled",
    "text",
    "text_input",
    "token_sampler",
    "windows",
]
