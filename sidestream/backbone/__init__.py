"""The frozen model behind one interface that knows no runtime: tokens, taps, precision, fingerprint."""

__all__ = ["taps", "text", "windows"]
