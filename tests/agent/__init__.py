"""Tests of the agent."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports transformers: no test asks the network
