"""The frozen model behind one interface that knows no runtime: tokens, taps, which vectors are sampled."""

__all__ = [
    "backbone",
    "commands",
    "inputs",
    "language_model",
    "memory",
    "runtimes",
    "sampled",
    "text",
    "text_input",
    "windows",
]
