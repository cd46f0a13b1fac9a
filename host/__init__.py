"""What a long-running Sidestream process needs of the machine it runs on: its state directory and its logs.

It knows nothing of MQTT, models or metrics.
"""
