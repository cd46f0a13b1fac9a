"""Where a model is computed, and that every tensor goes there and comes back; no GPU is needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from edge_agent.config import AgentConfig
from sidestream.accelerator.choice import check_choice, without_cuda
from sidestream.accelerator.providers import CPU, GPU_PROVIDERS, ask_for, what_came
from sidestream.accelerator.torch_device import Placement, choose
from sidestream.backbone.inputs import Text
from sidestream.backbone.torch_runtime.backbone import TorchBackbone
from sidestream.backbone.torch_runtime.vision import TorchVisionBackbone
from sidestream.contract.errors import ConfigError
from sidestream.contract.lora import LoraSpec
from sidestream.split_model.loading import lower_half
from tests.agent.test_vision import image
from tests.agent.tiny_vision import save_tiny_vision

CUDA, TENSORRT = GPU_PROVIDERS


class Gpus:
    """What a machine might have."""

    def __init__(self, *names: str, built: bool = True, broken: str = "") -> None:
        self.built = built
        self._names = names
        self._broken = broken

    def names(self) -> Sequence[str]:
        return self._names

    def try_out(self, index: int) -> None:
        if self._broken:
            raise RuntimeError(f"{self._broken}\nCUDA kernel errors might be reported later")


class Elsewhere(Placement):
    """The meta device, on which torch knows shapes only and refuses what lies anywhere else; or a second CPU,
    for models that look at values."""

    def __init__(self, device: str = "meta") -> None:
        super().__init__(torch.device(device), "a test")
        self.sent: list[tuple[int, ...]] = []
        self.fetched: list[tuple[int, ...]] = []

    def send(self, tensor: Tensor) -> Tensor:
        self.sent.append(tuple(tensor.shape))
        return super().send(tensor)

    def fetch(self, tensor: Tensor) -> Tensor:
        assert tensor.device == self.device
        self.fetched.append(tuple(tensor.shape))
        return torch.zeros(tensor.shape) if tensor.is_meta else tensor


@pytest.mark.parametrize(
    ("gpus", "device", "why"),
    [
        (Gpus("Orin"), "cuda:0", "Orin"),
        (Gpus(built=False), "cpu", "this build of torch knows no CUDA"),
        (Gpus(), "cpu", "torch finds no GPU"),
        (Gpus("Maxwell", broken="no kernel image"), "cpu", "Maxwell does not work .*: no kernel image$"),
    ],
)
def test_auto_takes_a_gpu_that_works_and_says_why_if_none_does(gpus: Gpus, device: str, why: str) -> None:
    chosen = choose("auto", gpus).chosen
    assert chosen.device == device and chosen.kind == device.partition(":")[0]
    with pytest.raises(AssertionError, match=why):
        raise AssertionError(chosen.why)


@pytest.mark.parametrize(
    ("wanted", "gpus", "said"),
    [
        (
            "cuda",
            Gpus(built=False),
            "compute_device: cuda: this build of torch knows no CUDA",
        ),
        ("cuda:2", Gpus("a", "b"), "compute_device: cuda:2: there are 2 GPUs, counted from 0"),
        ("cuda", Gpus("a", broken="no kernel image"), "compute_device: cuda: a does not work"),
    ],
)
def test_a_gpu_that_is_named_and_cannot_be_had_is_refused(wanted: str, gpus: Gpus, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        choose(wanted, gpus)


def test_the_processor_is_taken_where_it_is_set_and_another_gpu_where_that_is() -> None:
    assert str(choose("cpu", Gpus("a")).chosen) == "cpu (it is set)"
    assert choose("cuda:1", Gpus("a", "b")).chosen == ("cuda:1", "b")


@pytest.mark.parametrize("wrong", ["gpu", "cuda:", "cuda:-1", "CUDA", "", "cuda:1:2"])
def test_what_is_no_device_is_refused_with_the_field(wrong: str) -> None:
    with pytest.raises(ConfigError, match="is no device; write auto, cpu, cuda or cuda:1"):
        check_choice("compute_device", wrong)
    with pytest.raises(ConfigError, match="compute_device"):
        AgentConfig(job="a", compute_device=wrong)


def test_a_jetson_with_the_wrong_build_is_told_which_one(tmp_path: Path) -> None:
    (tmp_path / "nv_tegra_release").touch()
    assert "install NVIDIA's build" in without_cuda("torch", tmp_path / "nv_tegra_release")
    assert "Jetson" not in without_cuda("torch", tmp_path / "none")


def test_a_text_backbone_sends_everything_to_its_device_and_fetches_its_taps(bert: TorchBackbone) -> None:
    backbone, there = bert.twin(), Elsewhere("cpu")
    texts: list[Text] = ["turn the lights on", ("off", "now")]
    backbone.place(there)
    sampled, wanted = (one.forward(texts, [1, 3], 16) for one in (backbone, bert))
    assert np.array_equal(sampled.vectors, wanted.vectors)
    assert len(there.sent) == 3 and len({*there.sent}) == 1, "ids, mask and segments"
    assert len(there.fetched) == 2


def test_a_vision_backbone_does_the_same(tmp_path: Path) -> None:
    backbone, there = TorchVisionBackbone.load(str(save_tiny_vision(tmp_path / "vit"))), Elsewhere()
    backbone.place(there)
    assert not backbone.forward([image(1)], [1, 3], 4096).vectors.any()
    assert there.sent == [(1, 3, 32, 32)] and len(there.fetched) == 2


def test_int8_stays_on_the_processor_and_says_so(
    tiny: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    backbone, there = TorchBackbone.load(str(tiny("bert")), precision="int8"), Elsewhere()
    with caplog.at_level("INFO"):
        backbone.place(there)
    assert "computed on cpu (torch computes int8 on the processor only)" in caplog.text
    assert np.isfinite(backbone.forward(["off"], [1], 16).vectors).all() and not there.fetched


def test_a_split_job_takes_its_model_back_to_the_processor(bert: TorchBackbone) -> None:
    backbone = bert.twin()
    backbone.place(Placement(torch.device("cpu"), "a test"))
    lower_half(backbone, LoraSpec())
    assert backbone.placement.why == "the processor is what this uses"


def test_onnxruntime_is_asked_for_cuda_before_tensorrt_and_for_the_processor_last() -> None:
    every = [TENSORRT, CUDA, CPU]
    assert [name for name, _ in ask_for("auto", every)] == [CUDA, CPU]
    assert ask_for("cuda:1", [TENSORRT, CPU]) == [(TENSORRT, {"device_id": 1}), (CPU, {})]
    assert ask_for("cpu", every) == ask_for("auto", [CPU]) == [(CPU, {})]
    with pytest.raises(ConfigError, match="compute_device: cuda: this build of onnxruntime knows no CUDA"):
        ask_for("cuda", [CPU])


def test_a_provider_that_could_not_be_loaded_is_told_of() -> None:
    asked = ask_for("auto", [CUDA, CPU])
    assert what_came("auto", asked, [CUDA, CPU]) == ("cuda:0", CUDA)
    chosen = what_came("auto", asked, [CPU])
    assert chosen.device == "cpu" and "CUDAExecutionProvider, but cannot load it" in chosen.why
    assert what_came("cpu", ask_for("cpu", [CUDA, CPU]), [CPU]) == ("cpu", "it is set")
