"""What both ends of a Sidestream job must agree on: topics, messages, tensors, the plan, the side-network.

The ground floor of the house. It opens no socket, reads no clock and touches no file, and only
:mod:`contract.side_network` and :mod:`contract.output_head` import torch.
"""
