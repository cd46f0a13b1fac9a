"""Sidestream's top floor, the command line and its rooms, and the ground floors that both wings stand on."""

from sidestream.host.signals import heed_interrupts_of_module

heed_interrupts_of_module()

__all__ = ["version"]
