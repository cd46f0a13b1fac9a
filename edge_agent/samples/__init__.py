"""What the device has: sources, rows, and samples that can be told apart after a restart."""

__all__ = ["files", "images", "rows", "sample", "source", "sources", "survey"]
