"""Everything about the broker: settings, the one connection class, the embedded broker, mosquitto.conf.

The only place in the project that imports paho.
"""
