"""The frozen model in torch and transformers."""
