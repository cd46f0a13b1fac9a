"""What both ends of a Sidestream job must agree on: topics, messages, tensors, the plan.

The ground floor of the house. It opens no socket, reads no clock, touches no file and knows no torch.
"""

__all__ = [
    "codebooks",
    "errors",
    "lora",
    "plan",
    "privacy",
    "quality",
    "sampling",
    "signing",
    "spelling",
    "tasks",
    "tensors",
    "topics",
    "wire",
]
