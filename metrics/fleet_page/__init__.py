"""The fleet page: what the trainer knows of its devices, curves, and the server of the page."""

__all__ = ["board", "device_series", "fleet", "server", "summary", "troubles", "versions", "view"]
