"""Programs that measure Sidestream beside what it competes with; each prints a table and can write JSON."""

from sidestream.host.signals import heed_interrupts_of_module

heed_interrupts_of_module()
