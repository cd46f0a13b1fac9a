"""Each device's batch size, token limit and way to send, chosen by what it tells of itself."""

__all__ = ["tuner"]
