"""The side-network: its form, its bundle on the wire, the torch module that trains, and the output head."""

__all__ = ["bundle", "exported", "form", "inference", "network", "output_head"]
