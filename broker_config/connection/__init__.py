"""The one connection class, and what it is made of: link, window, packet limit, backoff."""

__all__ = ["connection", "tls", "window"]
