"""The frozen model behind one interface that knows no runtime: tokens, taps, which vectors are sampled."""

__all__ = [
    "backbone",
    "codebook_file",
    "commands",
    "inputs",
    "language_model",
    "memory",
    "runtimes",
    "sampled",
    "text_input",
    "token_sampler",
    "windows",
]
