"""Sidestream's top floor: the command line and the one-machine demo fleet."""

from sidestream.host.signals import heed_interrupts_of_module

heed_interrupts_of_module()

__all__ = ["version"]
