"""Measures one method's step in a process of its own: ``python -m benchmarks.probe``, a request on stdin.

Memory is the peak of resident memory during the steps, less resident memory once the model is loaded and one
tiny batch has passed, so that libraries which load on first use count for no method. Linux only.
"""

from __future__ import annotations

import ctypes
import gc
import re
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from statistics import median

import msgspec
import torch
from transformers import AutoModelForCausalLM

from benchmarks.lm_steps import LM_STEPS, Loaded
from benchmarks.shapes import random_backbone, random_decoder
from benchmarks.steps import STEPS, Step, layers_on_device
from sidestream.backbone.torch_runtime.backbone import TorchBackbone
from sidestream.backbone.torch_runtime.language_model import TorchLanguageModel
from sidestream.backbone.torch_runtime.saved_model import read_model
from sidestream.contract.errors import SidestreamError
from sidestream.contract.wire import prepared

_ROOT = Path(__file__).resolve().parents[1]
_STATUS = Path("/proc/self/status")


@prepared
class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What to measure."""

    method: str
    """One of the steps."""
    batches: list[list[str]]
    """The texts."""
    max_tokens: int
    """Longer texts are cut."""
    shape: str = ""
    """Of a random backbone; or"""
    backbone: str = ""
    """reference to a real one, with"""
    layers: int = 0
    """so many layers, 0 for all."""


@prepared
class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured."""

    cpu_s_per_sample: float
    """Processor time, all threads: median over the batches but the first."""
    peak_bytes: int
    """Above the loaded model."""
    model_bytes: int
    """Resident memory with the model loaded."""
    up_bytes_per_sample: float
    """Payload."""
    down_bytes_per_sample: float
    """Payload."""
    trainable: int
    """Parameters that the device trains; what a round of averaging would send, once each way."""


class ProbeError(SidestreamError):
    """A probe's process ended badly: too little memory, most likely."""


def measure(request: Request) -> Cost:
    """Run a probe in a process of its own.

    Raises:
        ProbeError: with the end of what it said.
    """
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.probe"],
        input=msgspec.json.encode(request),
        capture_output=True,
        cwd=_ROOT,
        check=False,
    )
    if ended.returncode:
        said = ended.stderr.decode(errors="replace").strip().splitlines() or ["it said nothing"]
        raise ProbeError(f"measuring {request.method} failed ({ended.returncode}): {said[-1][:300]}")
    return msgspec.json.decode(ended.stdout, type=Cost)


def main() -> int:
    torch.set_num_threads(1)
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=Request)
    sys.stdout.buffer.write(msgspec.json.encode(_probe(request)))
    return 0


def _probe(request: Request) -> Cost:
    step = _step(request)
    step.warm([" ".join(request.batches[0][0].split()[:4])])
    loaded = settle()
    seconds, up, down, samples = [], 0, 0, 0
    for batch in request.batches:
        began = time.process_time()
        traffic = step.run(batch)
        seconds.append((time.process_time() - began) / len(batch))
        up, down, samples = up + traffic.up, down + traffic.down, samples + len(batch)
    return Cost(
        cpu_s_per_sample=median(seconds[1:] or seconds),
        peak_bytes=max(0, memory("VmHWM") - loaded),
        model_bytes=loaded,
        up_bytes_per_sample=up / samples,
        down_bytes_per_sample=down / samples,
        trainable=step.trainable,
    )


def _step(request: Request) -> Step:
    if request.method in LM_STEPS:
        return LM_STEPS[request.method](_load_decoder(request), request.max_tokens)
    return STEPS[request.method](_load(request), request.max_tokens)


def _load_decoder(request: Request) -> Loaded:
    if request.shape:
        whole, tokenizer = random_decoder(request.shape)
    else:
        whole, tokenizer = read_model(request.backbone, AutoModelForCausalLM)
    return Loaded(whole, TorchLanguageModel(whole, tokenizer, name=request.shape or request.backbone))


def _load(request: Request) -> TorchBackbone:
    if request.shape:
        return random_backbone(request.shape, lambda depth: layers_on_device(request.method, depth))
    return TorchBackbone.load(request.backbone, request.layers)


def settle() -> int:
    """Give freed memory back, forget the peak so far, and return resident memory."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def memory(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    sys.exit(main())
