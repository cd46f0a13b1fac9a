"""The codebooks that a device's tier goes by: kept here, beside the backbone, shipped, or from the trainer.

Whatever they come from, they are used only if their content is what the plan names.
"""

from __future__ import annotations

import logging
import threading
import zlib
from pathlib import Path
from typing import Final

from sidestream.backbone.codebook_file import FILE_NAME, MAX_BYTES, CodebookFile, all_shipped, read, write
from sidestream.contract.codebooks import keep
from sidestream.contract.errors import BackboneError, DecodeError, StateError
from sidestream.contract.messages import CodebooksChunk
from sidestream.contract.plan import TierPlan
from sidestream.host.model_folder import locate_here

_STORE: Final = "codebooks.safetensors"
log = logging.getLogger(__name__)


class CodebooksInbox:
    """Of one device in one session. Chunks come on one thread; :attr:`found` is for any.

    Args:
        folder: The state directory: what was handed out stays there.
        reference: Where the device has its backbone.
    """

    def __init__(self, folder: Path, reference: str) -> None:
        self.found = threading.Event()
        """Set once the tier's codebooks are here."""
        self._kept = folder / _STORE
        self._reference = reference
        self._tier: TierPlan | None = None
        self._parts: dict[int, bytes] = {}

    def look(self, tier: TierPlan) -> bool:
        """Look for a settled tier's on this device; return whether they are here, or it takes none."""
        self._tier = tier
        if find_codebooks(tier, self._kept.parent, self._reference):
            self.found.set()
        return self.found.is_set()

    def on_chunk(self, chunk: CodebooksChunk) -> None:
        """Take a part in; the last one completes them.

        Raises:
            DecodeError: together they are not what the plan names.
        """
        tier = self._tier
        if tier is None or self.found.is_set() or chunk.id != tier.codebooks:
            return
        self._parts[chunk.index] = chunk.data
        if sum(map(len, self._parts.values())) > MAX_BYTES:
            self._parts.clear()
            raise DecodeError("the codebooks that were handed out are larger than such ever are")
        if len(self._parts) < chunk.chunks:
            return
        data, self._parts = b"".join(self._parts.get(index, b"") for index in range(chunk.chunks)), {}
        content = CodebookFile.from_bytes(_unzipped(data))
        if not _are_of(content, tier):
            raise DecodeError("the codebooks that were handed out are not those that the plan names")
        log.info("the trainer handed out codebooks: %.2f MB", len(data) / 1e6)
        try:
            write(self._kept, content)
        except BackboneError as exc:
            log.warning("codebooks are not kept, and are asked for again after a restart: %s", exc)
        self.found.set()


def find_codebooks(tier: TierPlan, folder: Path, reference: str) -> bool:
    """Have a tier's codebooks ready: from a state directory, from beside a backbone, or as shipped.

    Returns:
        Whether they are, or the tier takes none.
    """
    if not tier.codebooks:
        return True
    places = (folder / _STORE, *_beside(reference), *all_shipped())
    return any(_usable(path, tier) for path in places if path.is_file())


def require_codebooks(tier: TierPlan, folder: Path, reference: str) -> None:
    """As :func:`find_codebooks`, where nobody waits for the trainer to hand them out.

    Raises:
        StateError: they are not here.
    """
    if not find_codebooks(tier, folder, reference):
        raise StateError(
            f"{folder}: the codebooks that the plan names are not here; run the agent, which gets them"
        )


def _usable(path: Path, tier: TierPlan) -> bool:
    try:
        if _are_of(read(path), tier):
            return True
        log.info("%s: holds other codebooks than the plan's", path)
    except BackboneError as exc:
        log.warning("%s", exc)
    return False


def _are_of(content: CodebookFile, tier: TierPlan) -> bool:
    """Whether they are a tier's; they are ready for use then. What holds more layers or stages will do."""
    try:
        for stages in range(1, content.stages + 1):
            codebooks = content.of_taps(tier.taps, stages)
            if codebooks.id == tier.codebooks_id:
                keep(codebooks)
                return True
    except BackboneError:  # a layer is not in it
        pass
    return False


def _beside(reference: str) -> list[Path]:
    """Where codebooks may lie beside a backbone, be it a folder, a package or a hub's model."""
    try:
        return [Path(reference).expanduser() / FILE_NAME, locate_here(reference) / FILE_NAME]
    except BackboneError:  # an exported folder is no saved model
        return [Path(reference).expanduser() / FILE_NAME]


def _unzipped(data: bytes) -> bytes:
    """What was deflated, of no more than codebooks ever take.

    Raises:
        DecodeError: it was not, or is larger.
    """
    inflating = zlib.decompressobj()
    try:
        found = inflating.decompress(data, MAX_BYTES)
    except zlib.error as exc:
        raise DecodeError("the codebooks that were handed out are damaged") from exc
    if not inflating.eof:
        raise DecodeError("the codebooks that were handed out are cut short, or too large")
    return found
