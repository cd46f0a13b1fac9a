"""An exported split model in people's own tools: peft reads the adapters, this builds what they belong in.

A language model needs nothing of ours:

    base = transformers.AutoModelForCausalLM.from_pretrained("the backbone")
    model = peft.PeftModel.from_pretrained(base, "exported")

What classifies texts, or values them, has a head over the backbone's pooled states:

    base, tokenizer = load_base("exported")
    model = peft.PeftModel.from_pretrained(base, "exported")
    model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from sidestream.backbone.torch_runtime.backbone import TorchBackbone
from sidestream.contract.errors import StateError
from sidestream.contract.tasks import TASKS
from sidestream.split_model.classifier import Classifier, classifier_over
from sidestream.split_model.exported import ABOUT, ExportedSplit


def load_base(folder: str | Path, *, backbone: str = "") -> tuple[Classifier, Any]:
    """Build the model that the adapters and the head of an export belong in.

    Args:
        folder: The exported folder.
        backbone: Where the backbone is now, if it has moved since.

    Returns:
        The model, not tuned yet, and its tokenizer.

    Raises:
        StateError: there is no such export, or it is a language model's, which needs none of this.
        BackboneError: the backbone cannot be loaded, or is not the one the adapters were trained for.
    """
    place = Path(folder).expanduser()
    try:
        about = msgspec.json.decode((place / ABOUT).read_bytes(), type=ExportedSplit)
    except (OSError, msgspec.MsgspecError) as exc:
        raise StateError(f"{place}: is no export of a split model that can be read: {exc}") from exc
    if TASKS[about.task].generates:
        raise StateError(f"{place}: is a language model; give peft transformers' AutoModelForCausalLM")
    frozen = TorchBackbone.load(backbone or about.backbone)
    frozen.check(about.fingerprint)
    return classifier_over(frozen, about.outputs).eval(), frozen.text_input.tokenizer
