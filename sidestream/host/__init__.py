"""What a Sidestream process needs of its machine: settings file and flags, state directory, logs, signals.

It knows nothing of MQTT, models or metrics.
"""
