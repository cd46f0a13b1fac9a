"""The frozen model behind one interface that knows no runtime: tokens, taps, precision, fingerprint."""

__all__ = ["backbone", "commands", "language_model", "runtimes", "sampled", "text", "windows"]
