"""A bundle that came in several messages, put together. Bounded by what its manifest announced."""

from __future__ import annotations

from sidestream.contract.errors import DecodeError, MismatchError
from sidestream.contract.messages import WeightsChunk, WeightsManifest

MAX_BUNDLE_BYTES = 512 * 1024 * 1024


class Assembly:
    """Collects the chunks of one version.

    Raises:
        MismatchError: the manifest announces more than a device takes.
    """

    def __init__(self, manifest: WeightsManifest) -> None:
        if manifest.bundle_bytes > MAX_BUNDLE_BYTES:
            raise MismatchError(
                f"a bundle of {manifest.bundle_bytes} bytes; a device takes {MAX_BUNDLE_BYTES}"
            )
        self.manifest = manifest
        self._parts: dict[int, bytes] = {}
        self._bytes = 0

    def add(self, chunk: WeightsChunk) -> bytes | None:
        """Take a chunk in; chunks of other versions are ignored.

        Returns:
            The whole bundle once it is complete; its digest is not checked here.

        Raises:
            DecodeError: the chunks hold more than the manifest announced.
        """
        manifest = self.manifest
        foreign = (chunk.run, chunk.version) != (manifest.run, manifest.version)
        if foreign or chunk.index >= manifest.chunks or chunk.index in self._parts:
            return None
        self._bytes += len(chunk.data)
        if self._bytes > manifest.bundle_bytes:
            raise DecodeError(f"the chunks of version {manifest.version} hold more than was announced")
        self._parts[chunk.index] = chunk.data
        if len(self._parts) < manifest.chunks:
            return None
        return b"".join(self._parts[index] for index in range(manifest.chunks))
