"""What a Sidestream process needs of its machine: settings file and flags, state directory, logs, signals.

It knows nothing of MQTT, models or metrics.
"""

__all__ = [
    "commands",
    "flags",
    "logs",
    "model_folder",
    "now_and_then",
    "passwords",
    "secret_id",
    "settings_init",
    "settings_text",
    "signals",
    "state_dir",
    "toml",
    "trace",
]
