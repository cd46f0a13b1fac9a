"""Quality of adopted weights on the evaluation data, by the agent's own measure."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec

from benchmarks.workload import Workload
from edge_agent.batches.batch_maker import BatchMaker
from edge_agent.weights.adopted import AdoptedWeights
from edge_agent.weights.evaluation import EvaluationSet
from sidestream.backbone.backbone import Backbone
from sidestream.backbone.runtimes import shared_backbone
from sidestream.contract.plan import Plan
from sidestream.contract.wire import TARGET_MESSAGE_BYTES
from sidestream.side_network.inference import InferenceNetwork

Load = Callable[[str, int], Backbone]


class Evaluator:
    """Keeps the evaluation samples' activations: one forward pass each for a tier's taps.

    Args:
        work: Data and tiers.
        load: Gives the backbone of a reference and so many layers.
    """

    def __init__(self, work: Workload, load: Load = shared_backbone) -> None:
        self._work = work
        self._load = load
        self._sets: dict[bytes, EvaluationSet] = {}

    def measures(self, kept: AdoptedWeights) -> Mapping[str, float]:
        """Of a tier's adopted weights, over all evaluation samples."""
        score = self._set(kept).measure(InferenceNetwork(kept.bundle), kept.adopted.tier_plan.align)
        assert score is not None, "nobody stops it"
        return score.measures

    def _set(self, kept: AdoptedWeights) -> EvaluationSet:
        adopted, work = kept.adopted, self._work
        own = work.on_device.get(adopted.tier)
        key = msgspec.json.encode((own, adopted.tier_plan))
        if key not in self._sets:
            plan = plan_of(kept)
            layers = work.tiers[adopted.tier]
            if own is not None:  # judged as its devices answer
                backbone = shared_backbone(own[0], layers, own[1])
            else:
                backbone = self._load(work.backbone_of(adopted.tier), layers)
            rows = [example.row for example in work.evaluation]
            maker = BatchMaker(backbone, plan, adopted.tier, TARGET_MESSAGE_BYTES)
            self._sets[key] = EvaluationSet(maker, plan.task, lambda: rows, stopped=lambda: False)
        return self._sets[key]


def plan_of(kept: AdoptedWeights) -> Plan:
    """The plan that adopted weights go by, as far as their own tier sees it."""
    about = kept.bundle.about
    return Plan(
        job=about.job,
        run=kept.adopted.run,
        revision=0,
        task=about.task,
        labels=about.labels,
        tiers={kept.adopted.tier: kept.adopted.tier_plan},
        side_network=about.side_network,
    )


def trainable(kept: AdoptedWeights) -> int:
    """Parameters of a tier's side-network."""
    return sum(one.size for one in kept.bundle.tensors.values())
