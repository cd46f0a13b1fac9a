"""From samples and activations to messages."""
