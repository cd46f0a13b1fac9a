"""Every training method that a plan can name, and what learns by it. Total, or nothing starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, get_args

from side_trainer.journal.records import FACTS, RecordKind
from side_trainer.method import Method
from side_trainer.settling import TierSettler
from side_trainer.side_tuning.in_cells import SideTuningInCells
from side_trainer.side_tuning.method import SideTuningMethod
from side_trainer.side_tuning_tiers import SideTuningSettler
from side_trainer.split_lora.frozen import SplitFrozenMethod
from side_trainer.split_lora.method import SplitLoraMethod
from side_trainer.split_lora.settling import SplitSettler
from sidestream.contract.plan import FedMobiLLM, MethodPlan, MobiLLM, SplitFrozen, SplitLora

METHODS: Final[Mapping[type[MethodPlan], type[Method]]] = {
    FedMobiLLM: SideTuningMethod,
    MobiLLM: SideTuningMethod,
    SplitLora: SplitLoraMethod,
    SplitFrozen: SplitFrozenMethod,
}
IN_CELLS: Final[Mapping[type[MethodPlan], type[SideTuningInCells]]] = {
    FedMobiLLM: SideTuningInCells,
    MobiLLM: SideTuningInCells,
}
"""What learns by it where the trainers of several cells do so together."""
SETTLERS: Final[Mapping[type[MethodPlan], type[TierSettler]]] = {
    FedMobiLLM: SideTuningSettler,
    MobiLLM: SideTuningSettler,
    SplitLora: SplitSettler,
    SplitFrozen: SplitSettler,
}
"""How its tiers are settled."""


def check_total(methods: Mapping[type[MethodPlan], type[Method]]) -> None:
    """See that every method of a plan has its class, and that one a handler for every kind of record.

    Raises:
        AssertionError: naming what lacks.
    """
    for what, known in (("Method", methods), ("TierSettler", SETTLERS)):
        if lacking := set(get_args(MethodPlan)) - known.keys():
            raise AssertionError(f"no {what} for {sorted(one.__name__ for one in lacking)}")
    for method in methods.values():
        if (handled := method.handlers.keys()) != (wanted := set(RecordKind) - FACTS):
            raise AssertionError(f"{method.__name__} handles {sorted(handled)}, and has to {sorted(wanted)}")


check_total(METHODS)
