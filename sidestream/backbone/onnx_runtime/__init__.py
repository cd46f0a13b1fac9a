"""The frozen model in onnxruntime, from an exported folder: without torch, and without transformers."""

import os

__all__ = ["backbone", "folder", "runtime"]

# From 1.29 on onnxruntime gives the machine an id, notes what it does and sends that to its maker. Whoever
# wants that sets the variable to 0. It is read at the import.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
# The few texts of a batch are not worth a pool of threads for as long as the process lives.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
