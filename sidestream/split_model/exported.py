"""What a trained split model is written as: peft's two files, and one that says what stands around them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec

from sidestream.backbone.torch_runtime.backbone import TorchBackbone
from sidestream.contract.messages import MAX_LABELS, check_labels
from sidestream.contract.tasks import TASKS, Task
from sidestream.contract.wire import Message, prepared

ADAPTERS: Final = "adapter_model.safetensors"
CONFIG: Final = "adapter_config.json"
ABOUT: Final = "sidestream_split.json"


@prepared
class ExportedSplit(Message, frozen=True, kw_only=True):
    """What peft does not keep."""

    backbone: str
    """Reference to the frozen model."""
    fingerprint: str
    """Of all its layers."""
    task: Task
    """What was learnt."""
    labels: Annotated[tuple[str, ...], msgspec.Meta(max_length=MAX_LABELS)] = ()
    """Label names in index order; none where the task has none."""

    def __post_init__(self) -> None:
        check_labels(self.labels)

    @property
    def outputs(self) -> int:
        """Numbers in an answer."""
        return TASKS[self.task].outputs(len(self.labels))


def write_export(model: Any, backbone: TorchBackbone, task: Task, labels: Sequence[str]) -> dict[str, bytes]:
    """Files by name; equal weights, equal bytes.

    Args:
        model: peft's.
        backbone: What is frozen.
        task: What was learnt.
        labels: The job's, in index order.
    """
    about = ExportedSplit(
        backbone=backbone.name, fingerprint=backbone.fingerprint, task=task, labels=tuple(labels)
    )
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, save_embedding_layers=False)
        written = {name: (Path(folder) / name).read_bytes() for name in (ADAPTERS, CONFIG)}
    config = json.loads(written[CONFIG])
    config["target_modules"] = sorted(config["target_modules"])  # peft has a set, in no order
    written[CONFIG] = json.dumps(config, indent=2, sort_keys=True).encode()
    return {**written, ABOUT: msgspec.json.format(msgspec.json.encode(about))}
