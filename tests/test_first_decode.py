"""Several threads may decode a type for the first time: it is ready once its module has been imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

ROOMS = (
    "sidestream",
    "edge_agent",
    "side_trainer",
    "broker_config",
    "metrics",
    "benchmarks",
)

_WALK = f"""
import gc, importlib, pkgutil
import msgspec

for room in {ROOMS}:
    for module in pkgutil.walk_packages(importlib.import_module(room).__path__, room + "."):
        importlib.import_module(module.name)

def below(kind):
    for one in kind.__subclasses__():
        yield one
        yield from below(one)

def ready(kind):
    return any(type(one).__name__ == "StructInfo" for one in gc.get_referents(kind))

class Unready(msgspec.Struct):
    field: int = 0

ours = [kind for kind in below(msgspec.Struct) if kind.__module__.split(".")[0] in {ROOMS}]
assert len(ours) > 50 and not ready(Unready)
print(*(f"{{kind.__module__}}.{{kind.__name__}}" for kind in ours if not ready(kind)))
"""

_RACE = """
import sys, threading
from contextlib import suppress
import msgspec
from sidestream.side_network import bundle
from broker_config import enrolment
from sidestream.side_network import exported
from sidestream.contract import messages
from sidestream.contract import plan
from sidestream.contract import wire
from sidestream.contract.errors import DecodeError
from edge_agent.config import AgentConfig
from side_trainer.settings.schema import TrainerConfig

sys.setswitchinterval(1e-6)
start = threading.Barrier(8)

def decode_each_type():
    start.wait()
    for kind in wire.Message.__subclasses__():
        with suppress(DecodeError):
            wire.unpack(kind, b"\\x81\\xa1v\\x01")
    for kind in (AgentConfig, TrainerConfig):
        with suppress(msgspec.ValidationError):
            msgspec.convert({"job": "j", "broker": {}, "tiers": {"a": {}}}, type=kind)
    wire.unpack(messages.Flow, wire.pack(messages.Flow(window=4)))

threads = [threading.Thread(target=decode_each_type) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


def _run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_every_type_is_ready_once_its_module_is_imported() -> None:
    ended = _run(_WALK)
    assert (ended.returncode, ended.stdout.split()) == (0, []), ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize("run", range(12))
def test_eight_threads_decode_every_type_at_once(run: int) -> None:
    ended = _run(_RACE)
    assert ended.returncode == 0, (run, ended.stderr)
