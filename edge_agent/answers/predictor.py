"""Frozen backbone and adopted side-network answer questions: offline, without a broker.

import edge_agent
predictor = edge_agent.load("/var/lib/sidestream")
predictor.predict(["turn the lights off"])[0].label

With a language model's weights it is ``edge_agent.load(...).generate("To be, or")``.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from edge_agent.answers.predicting import Predictor as Predictor
from edge_agent.answers.remote_predictor import Asks, RemotePredictor
from edge_agent.answers.side_predictor import SidePredictor
from edge_agent.answers.split_predictor import SplitPredictor
from edge_agent.split_lora.reading import bundle_of
from edge_agent.split_lora.whole import WholeModel, has_room
from edge_agent.weights.adopted import Adopted, AdoptedWeights, load_adopted
from edge_agent.weights.codebooks import require_codebooks
from sidestream.backbone.runtimes import RuntimeChoice, shared_backbone
from sidestream.contract.errors import StateError, WireError
from sidestream.contract.plan import Split
from sidestream.side_network.bundle import decode_bundle, digest
from sidestream.side_network.exported import INDEX, WEIGHTS, Exported


def load_exported(folder: str | Path, *, backbone: str = "", runtime: RuntimeChoice = "auto") -> Predictor:
    """Load what ``sidestream trainer export --format hf`` wrote; the machine need never have been an agent.

    Args:
        folder: The exported folder.
        backbone: Where the backbone is now, if it has moved since; an exported one takes no torch.
        runtime: What computes it.

    Raises:
        StateError: there is no such export, or it is damaged.
        BackboneError: the backbone cannot be loaded, or is not the one the weights were trained for.
    """
    place = Path(folder).expanduser()
    try:
        exported = msgspec.json.decode((place / INDEX).read_bytes(), type=Exported)
        data = (place / WEIGHTS).read_bytes()
        bundle = decode_bundle(data)
    except (OSError, msgspec.MsgspecError, WireError) as exc:
        raise StateError(f"{place}: is no export that can be read: {exc}") from exc
    if digest(data) != exported.weights_digest:
        raise StateError(f"{place}: the weights are damaged; export them again")
    tier, task = exported.tier_plan, bundle.about.task
    if not (reference := backbone or tier.backbone):
        raise StateError(f"{place}: does not say where its backbone is; give backbone=")
    adopted = Adopted(
        run=bundle.about.run,
        version=bundle.about.version,
        bundle_digest=exported.weights_digest,
        state_digest="",
        tier=exported.tier,
        tier_plan=tier,
        backbone=reference,
    )
    frozen = shared_backbone(reference, tier.layers, tier.precision, task, runtime=runtime)
    return SidePredictor(adopted, bundle, frozen)


def load(state_dir: str | Path, *, backbone: str = "", whole_model: WholeModel = "always") -> Predictor:
    """Load what an agent has adopted in its state directory; the agent may be running.

    Args:
        state_dir: The agent's state directory.
        backbone: Where the backbone is now, if it has moved since.
        whole_model: Of a split job: whether all layers may be loaded; auto: where there is room.

    Raises:
        StateError: nothing has been adopted there, or it is damaged, or takes more room than there is.
        BackboneError: the backbone cannot be loaded, or is not the one the weights were trained for.
    """
    kept = _kept(state_dir)
    adopted = kept.adopted
    if isinstance(adopted.method, Split):
        if not has_room(adopted.tier_plan, whole_model):
            room = adopted.tier_plan.whole_bytes
            raise StateError(
                f"this device has no room for the whole model ({room >> 20} MiB), which answers take. Have "
                'the trainer predict: remote = true in [predict] of agent.toml, and "agent predict --config '
                'agent.toml"; or set whole_model = "always" there, to have it try'
            )
        return SplitPredictor(kept, backbone)
    reference = backbone or adopted.backbone
    tier, task = adopted.tier_plan, kept.bundle.about.task
    frozen = shared_backbone(reference, tier.layers, tier.precision, task)
    return SidePredictor(adopted, kept.bundle, frozen)


def needs_trainer(state_dir: str | Path, whole_model: WholeModel) -> bool:
    """Whether a device cannot answer by itself: it has no room, or not yet all that answers take.

    Raises:
        StateError: nothing has been adopted, or it is damaged.
    """
    kept = _kept(state_dir)
    if not isinstance(kept.adopted.method, Split):
        return False
    return not (bundle_of(kept).about.whole and has_room(kept.adopted.tier_plan, whole_model))


def load_remote(
    state_dir: str | Path, asker: Asks, *, backbone: str = "", runtime: RuntimeChoice = "auto"
) -> Predictor:
    """A predictor that computes this device's layers only, and asks the trainer.

    Raises:
        StateError: nothing has been adopted, or it is damaged, or the job is a language model's.
        BackboneError: the backbone cannot be loaded, or is another one.
    """
    kept, folder = _kept(state_dir), Path(state_dir).expanduser()
    require_codebooks(kept.adopted.tier_plan, folder, backbone or kept.adopted.backbone)
    return RemotePredictor(kept, asker, backbone, runtime)


def tier_of(state_dir: str | Path) -> str:
    """The tier of the device that adopted.

    Raises:
        StateError: nothing has been adopted, or it is damaged.
    """
    return _kept(state_dir).adopted.tier


def _kept(state_dir: str | Path) -> AdoptedWeights:
    folder = Path(state_dir).expanduser()
    if not folder.is_dir():
        raise StateError(f"{folder}: there is no such state directory")
    kept = load_adopted(folder)
    if kept is None:
        raise StateError(
            f"{folder}: no weights have been adopted yet; run the agent until it logs that it did"
        )
    return kept
