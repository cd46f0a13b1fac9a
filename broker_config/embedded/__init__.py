"""The broker for those who have none: Mosquitto where it is installed, amqtt in a child process elsewhere."""

__all__ = ["broker"]
