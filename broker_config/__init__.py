"""Everything about the broker: settings, the one connection class, the embedded broker, mosquitto.conf.

The only place in the project that imports paho.
"""

from sidestream.host.signals import heed_interrupts_of_module

heed_interrupts_of_module()

__all__ = ["access", "authority", "cli", "errors", "mosquitto", "settings", "transport"]
