"""A group by torch.distributed, over gloo: formed, lost, and formed anew, within one process's life.

A side-network's gradient is a few mebibytes, so it goes by the processor even where a GPU learns. Nothing is
pickled: ranks exchange bytes and vectors. They trust each other: the port is for a network of one's own.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Final

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined, unused-ignore]

from side_trainer.cells.group import CellLost

_log = logging.getLogger(__name__)
_SHORT: Final = 4096
"""Bytes of an exchange that takes one round."""
_HEAD: Final = 16  # of each: a digest of what it is, and its length
_ACTS_S: Final = 60.0
"""A rank that takes part in an exchange so much later than the others is taken for gone."""
_MEETS_S: Final = 5.0
_LOOKS_S: Final = 0.05

OpenStore = Callable[[], Store]


class TorchGroup:
    """One rank.

    Args:
        rank: This one's.
        size: How many there are.
        open_store: Opens the store through which they find each other.
        acts_s: How long the others may take for anything.
    """

    def __init__(self, rank: int, size: int, open_store: OpenStore, *, acts_s: float = _ACTS_S) -> None:
        self.rank = rank
        self.size = size
        self.formed = False
        """Whether all were there when it was last tried."""
        self._open_store = open_store
        self._acts = timedelta(seconds=acts_s)
        self._store: Store | None = None
        self._token = ""
        self._used: set[str] = set()  # tokens of groups that were formed, or tried

    # --- forming -------------------------------------------------------------------------------------

    def form(self, wait_s: float = 0.5) -> bool:
        """Look for a while whether all are there; call it until they are."""
        try:
            if self._store is None:
                self._store = self._open_store()
            self.formed = self._meet(self._store, time.monotonic() + wait_s)
        except RuntimeError as exc:  # what torch.distributed raises, of stores and of ranks
            _log.debug("no group: %s", exc)
            self._store = None
            self.leave()
        return self.formed

    def _meet(self, store: Store, deadline_s: float) -> bool:
        """Rank 0 names a group once every rank is there anew; all say that they have seen it."""
        if not self._token:
            self._token = secrets.token_hex(8)
            store.set(f"here/{self.rank}", self._token)
        while not self._named(store):
            if time.monotonic() > deadline_s:
                return False
            time.sleep(_LOOKS_S)
        name = hashlib.sha256(store.get("group")).hexdigest()[:16]
        self._token = ""  # good for one try
        store.add(f"{name}/seen", 1)
        deadline_s = time.monotonic() + _MEETS_S
        while store.add(f"{name}/seen", 0) < self.size:
            if time.monotonic() > deadline_s:
                return False
            time.sleep(_LOOKS_S)
        dist.init_process_group(
            "gloo",
            store=PrefixStore(name, store),
            rank=self.rank,
            world_size=self.size,
            timeout=self._acts,
        )
        return True

    def _named(self, store: Store) -> bool:
        """Whether a group is named that has this rank as it is now."""
        if self.rank == 0:
            keys = [f"here/{rank}" for rank in range(self.size)]
            if not store.check(keys):
                return False
            if store.check(["group"]):  # that of an earlier life of this process
                self._used.update(json.loads(store.get("group")))
            tokens = [store.get(key).decode() for key in keys]
            if self._used.intersection(tokens):
                return False
            self._used.update(tokens)
            store.set("group", json.dumps(tokens))
            return True
        return store.check(["group"]) and self._token in json.loads(store.get("group"))

    def leave(self) -> None:
        """Have the others notice that this rank is not with them any more."""
        self.formed, self._token = False, ""
        if dist.is_initialized():
            dist.destroy_process_group()

    # --- within it -----------------------------------------------------------------------------------

    def gather(self, what: str, data: bytes) -> list[bytes]:
        sent = hashlib.sha256(what.encode()).digest()[: _HEAD // 2] + len(data).to_bytes(_HEAD // 2, "little")
        short = self._gather((sent + data[: _SHORT - _HEAD]).ljust(_SHORT, b"\0"))
        if any(one[: _HEAD // 2] != sent[: _HEAD // 2] for one in short):
            self.leave()
            raise CellLost(f"the others are not at {what}")
        lengths = [int.from_bytes(one[_HEAD // 2 : _HEAD], "little") for one in short]
        longest = max(lengths)
        if longest <= _SHORT - _HEAD:
            return [one[_HEAD : _HEAD + length] for one, length in zip(short, lengths, strict=True)]
        return [
            one[:length]
            for one, length in zip(self._gather(data.ljust(longest, b"\0")), lengths, strict=True)
        ]

    def add(self, values: torch.Tensor) -> None:
        self._do(lambda: dist.all_reduce(values))

    def _gather(self, data: bytes) -> list[bytes]:
        own = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        found = [torch.empty_like(own) for _ in range(self.size)]
        self._do(lambda: dist.all_gather(found, own))
        return [one.numpy().tobytes() for one in found]

    def _do(self, act: Callable[[], object]) -> None:
        if not self.formed:
            raise CellLost("not all are there")
        try:
            act()
        except RuntimeError as exc:
            self.leave()
            _log.debug("%s", exc)
            raise CellLost("another cell's trainer is gone, or does not answer") from exc


def store_of(environ: Mapping[str, str], job: str, rank: int) -> OpenStore:
    """The store that torchrun keeps, or else rank 0: as the environment says.

    Raises:
        KeyError, ValueError: it does not.
    """
    host, port = environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
    serves = rank == 0 and environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    served: list[TCPStore] = []

    def open_store() -> Store:
        if serves and not served:
            served.append(_connect(host, port, serves=True))
        store = served[0] if serves else _connect(host, port, serves=False)
        return PrefixStore(f"sidestream/{job}", store)

    return open_store


def _connect(host: str, port: int, *, serves: bool) -> TCPStore:
    timeout = timedelta(seconds=_MEETS_S)
    return TCPStore(host, port, None, serves, timeout=timeout, wait_for_workers=False)
