"""What a Sidestream process needs of its machine: settings file and flags, state directory, logs, signals.

It knows nothing of MQTT or metrics, and of models only where they lie.
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
