"""The frozen model behind one interface that knows no runtime: tokens, taps, which vectors are sampled."""

__all__ = ["backbone", "language_model", "runtimes", "sampled", "text", "windows"]
