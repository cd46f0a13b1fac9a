"""Every training method that a plan can name, and what a device does under it. Total, or nothing starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, get_args

from edge_agent.method import DeviceMethod
from edge_agent.side_tuning.method import SideTuningDevice
from edge_agent.split_lora.method import SplitFrozenDevice, SplitLoraDevice
from sidestream.contract.plan import FedMobiLLM, MethodPlan, MobiLLM, SplitFrozen, SplitLora

METHODS: Final[Mapping[type[MethodPlan], type[DeviceMethod]]] = {
    FedMobiLLM: SideTuningDevice,
    MobiLLM: SideTuningDevice,
    SplitLora: SplitLoraDevice,
    SplitFrozen: SplitFrozenDevice,
}
if lacking := set(get_args(MethodPlan)) - METHODS.keys():  # pragma: no cover
    raise AssertionError(f"no DeviceMethod for {sorted(one.__name__ for one in lacking)}")
