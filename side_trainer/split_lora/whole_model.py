"""The one whole model that a trainer of a split job has, and what devices with its first layers must show."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from side_trainer.journal.records import SettingsRecord
from sidestream.backbone.runtimes import load_backbone
from sidestream.contract.errors import BackboneError
from sidestream.contract.plan import Precision, Split
from sidestream.contract.tasks import TASKS, Task

if TYPE_CHECKING:  # transformers and peft take seconds, and a trainer of a side-network needs neither
    from sidestream.backbone.torch_runtime.backbone import TorchBackbone
    from sidestream.split_model.split_model import SplitModel

_SHARE_OF_FREE = 0.6
_PASS_SHARE = 0.5  # of a layer's weights: what a pass through it holds for the way back, at usual batches


class CutFacts(NamedTuple):
    """What is fixed of a tier whose devices hold the first ``cut`` layers."""

    cut: int
    width: int
    fingerprint: str
    vocabulary: int
    whole_depth: int
    whole_fingerprint: str
    whole_bytes: int


class WholeModel:
    """A backbone with all its layers, looked at before anything is learnt.

    Args:
        reference: Where it is on this machine.
        task: What it is for.

    Raises:
        BackboneError: it cannot be loaded.
    """

    def __init__(self, reference: str, task: Task) -> None:
        self._backbone = load_whole(reference, task)
        self._task = task

    def check(self, split: Split) -> None:
        """See that it can be cut in two, with LoRA in it.

        Raises:
            BackboneError: it cannot.
        """
        from sidestream.split_model.split_model import SplitModel

        SplitModel(self._backbone, split.lora, task=self._task, labels=2, seed=0)

    def facts(self, cut: int, field: str) -> CutFacts:
        """What devices with the first ``cut`` layers must show; ``field`` names the setting.

        Raises:
            BackboneError: the trainer would have no layer left.
        """
        whole = self._backbone
        if cut >= whole.depth:
            raise BackboneError(
                f"{field}: {cut} of {whole.depth} layers leave none above; at most {whole.depth - 1}"
            )
        return CutFacts(
            cut=cut,
            width=whole.width,
            fingerprint=whole.fingerprint_of_first(cut),
            vocabulary=int(getattr(whole, "vocabulary", 0)) if TASKS[self._task].generates else 0,
            whole_depth=whole.depth,
            whole_fingerprint=whole.fingerprint,
            whole_bytes=_bytes(one for _, one in whole.parameters()),
        )

    def deepest_cut(self, free_bytes: int) -> int:
        """How many layers a device with so much free memory has room for, one at least."""
        layers = [_bytes(layer.parameters()) for layer in self._backbone.stack.layers]
        below = _bytes(one for _, one in self._backbone.parameters()) - sum(layers)
        room, cut = _SHARE_OF_FREE * free_bytes - below, 0
        while cut < len(layers) - 1 and (room := room - (1 + _PASS_SHARE) * layers[cut]) >= 0:
            cut += 1
        return max(cut, 1)


def load_whole(reference: str, task: Task, precision: Precision = "f32") -> TorchBackbone:
    """Load all layers of a backbone, as a language model where the task is one's.

    Raises:
        BackboneError: it cannot be loaded, or not by torch.
    """
    from sidestream.backbone.torch_runtime.backbone import TorchBackbone

    found = load_backbone(reference, 0, precision, task, runtime="torch")
    assert isinstance(found, TorchBackbone)
    return found


def learning_model(settings: SettingsRecord, reference: str, fingerprint: str, labels: int) -> SplitModel:
    """The model that a job learns.

    Args:
        settings: The job's.
        reference: Where the backbone is on this machine.
        fingerprint: What it must be.
        labels: How many labels the job has.

    Raises:
        BackboneError: it cannot be loaded, or is another one.
    """
    assert isinstance(settings.method, Split)
    from sidestream.split_model.split_model import SplitModel

    backbone = load_whole(reference, settings.task)
    backbone.check(fingerprint)
    seed = settings.learner.seed
    return SplitModel(backbone, settings.method.lora, task=settings.task, labels=labels, seed=seed)


def _bytes(parameters: Iterable[Tensor]) -> int:
    return sum(one.numel() * 4 for one in parameters)
