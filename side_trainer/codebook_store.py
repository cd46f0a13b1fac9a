"""Codebooks that a job goes by, kept beside its journal: a record can be folded wherever the folder is.

The settings name a file (``codebooks``); what a tier takes of it is fixed with
the tier, by its id, and a copy of that stays here, whatever becomes of the file.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Final

from side_trainer.journal.records import TierRecord
from sidestream.backbone.codebook_file import FILE_NAME, SHIPPED, CodebookFile, read, shipped, write
from sidestream.contract.codebooks import Codebooks, keep
from sidestream.contract.errors import BackboneError, StateError

FOLDER: Final = "codebooks"


class CodebookStore:
    """Those in a trainer's state directory.

    Args:
        state_dir: The directory.
    """

    def __init__(self, state_dir: Path) -> None:
        self._folder = state_dir / FOLDER

    def take(self, reference: str, tier: TierRecord, stages: int) -> str:
        """Keep a copy of what a tier takes; return its id.

        Args:
            reference: A file, or the folder that it is in; or "shipped".
            tier: Which, with its taps and its backbone's fingerprint.
            stages: As many as its codecs take.

        Raises:
            BackboneError: there is no such file, it is of another backbone, or lacks a layer.
            StateError: the copy cannot be written.
        """
        path = place_of(reference, tier.backbone)
        try:
            whole = read(path)
            whole.check(tier.fingerprint, tier.depth)
            codebooks = keep(whole.of_taps(tier.taps, stages))
        except BackboneError as exc:
            text = str(exc)
            raise BackboneError(text if text.startswith(str(path)) else f"{path}: {text}") from exc
        copy = self._path(codebooks.id.hex())
        if not copy.exists():
            try:
                self._folder.mkdir(mode=0o700, exist_ok=True)
                write(copy, whole.cut_to(tier.taps, stages))
            except (OSError, BackboneError) as exc:
                raise StateError(f"{copy}: cannot be written: {exc}") from exc
        return codebooks.id.hex()

    def load(self) -> None:
        """Have all that are here ready for decoding.

        Raises:
            StateError: one is damaged.
        """
        for path in sorted(self._folder.glob("*.safetensors")) if self._folder.is_dir() else ():
            keep(_all_of(self._checked(path)))

    def payload(self, id_: str) -> bytes:
        """What devices are handed that have none: the file, deflated.

        Raises:
            StateError: it is not here, or damaged.
        """
        return zlib.compress(self._checked(self._path(id_)).to_bytes(), 9)

    def _checked(self, path: Path) -> CodebookFile:
        try:
            found = read(path)
            if _all_of(found).id.hex() == path.stem:
                return found
        except BackboneError as exc:
            raise StateError(f"{exc}; restore the state directory's copy from a backup") from exc
        raise StateError(f"{path}: is damaged; restore it from a backup of the state directory")

    def _path(self, id_: str) -> Path:
        return self._folder / f"{id_}.safetensors"


def _all_of(content: CodebookFile) -> Codebooks:
    return content.of_taps(tuple(content.by_layer), content.stages)


def place_of(reference: str, backbone: str) -> Path:
    """The file that is meant by a file, a folder or "shipped".

    Raises:
        BackboneError: none is shipped for the backbone.
    """
    if reference == SHIPPED:
        if (found := shipped(backbone)) is None:
            raise BackboneError(
                f"no codebooks are shipped for {backbone}: fit some with sidestream backbone codebooks"
            )
        return found
    path = Path(reference).expanduser()
    return path / FILE_NAME if path.is_dir() else path
