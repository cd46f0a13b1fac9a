"""An exported side-network in its backbone: a transformers model like any other, for people's own tools.

import edge_agent
model, tokenizer = edge_agent.load_tuned("exported")

It is the backbone's own class, ``forward``, ``generate`` and all: what its last layer gives is lifted by the
side-network before the model's own norm and head see it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from sidestream.backbone.torch_runtime.language_model import TorchLanguageModel
from sidestream.backbone.torch_runtime.saved_model import read_model
from sidestream.contract.errors import StateError, WireError
from sidestream.side_network.bundle import decode_bundle, digest
from sidestream.side_network.exported import INDEX, WEIGHTS, Exported
from sidestream.side_network.network import SideNetwork, from_bundle


def load_tuned(folder: str | Path, *, backbone: str = "") -> tuple[Any, Any]:
    """Load what ``sidestream trainer export --format hf`` wrote.

    Args:
        folder: The exported folder.
        backbone: Where the backbone is now, if it has moved since.

    Returns:
        The model, of the backbone's class of transformers, and its tokenizer.

    Raises:
        StateError: there is no such export, or it is damaged.
        BackboneError: the backbone cannot be loaded, or is not the one the weights were trained for.
    """
    place = Path(folder).expanduser()
    try:
        exported = msgspec.json.decode((place / INDEX).read_bytes(), type=Exported)
        data = (place / WEIGHTS).read_bytes()
        if digest(data) != exported.weights_digest:
            raise StateError(f"{place}: the weights are damaged; export them again")
        network = from_bundle(decode_bundle(data))
    except (OSError, msgspec.MsgspecError, WireError) as exc:
        raise StateError(f"{place}: is no export that can be read: {exc}") from exc
    plan = exported.tier_plan
    model, tokenizer = read_model(backbone or plan.backbone, AutoModelForCausalLM)
    frozen = TorchLanguageModel(model, tokenizer, layers=plan.layers, name=backbone or plan.backbone)
    frozen.check(plan.fingerprint)
    frozen.check_head(plan.head)
    model.config.use_cache = True
    # Some tokenizers of transformers 4 give token types too, which no decoder's generate takes.
    tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
    model.side_network = network  # moves with the model
    _insert(frozen.layers, network, plan.align, plan.taps)
    return model, tokenizer


def _insert(layers: nn.ModuleList, network: SideNetwork, align: str, taps: Sequence[int]) -> None:
    """Have the last tapped layer give lifted states."""
    read: list[Tensor] = []

    def reader(*, is_first: bool) -> Callable[[Any, Any, Any], None]:
        def hook(module: Any, given: Any, out: Any) -> None:
            if is_first:
                read.clear()
            read.append(_states(out))

        return hook

    def lift(module: Any, given: Any, out: Any) -> Any:
        states = _states(out)
        lifted = network.refine(align, torch.stack(read).float()).to(states.dtype)
        read.clear()
        if isinstance(out, list):
            return [lifted, *out[1:]]
        return (lifted, *out[1:]) if isinstance(out, tuple) else lifted

    for number, tap in enumerate(taps):
        layers[tap - 1].register_forward_hook(reader(is_first=number == 0))
    layers[taps[-1] - 1].register_forward_hook(lift)


def _states(out: Any) -> Tensor:
    states: Tensor = out[0] if isinstance(out, tuple | list) else out
    return states
