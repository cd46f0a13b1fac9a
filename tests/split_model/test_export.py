"""An exported split model is read by peft in two lines and answers as the trainer does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.zoo import tokenizer
from sidestream.backbone.runtimes import load_backbone
from sidestream.backbone.text_input import Tokens
from sidestream.backbone.torch_runtime.backbone import TorchBackbone
from sidestream.contract.errors import BackboneError, StateError
from sidestream.contract.tasks import Task
from sidestream.split_model.exported import ABOUT
from sidestream.split_model.split_model import SplitModel
from sidestream.split_model.tuned import load_base
from tests.split_model.halves import model_of, scattered, spec, texts

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
LABELS = ("cold", "mild", "warm")


def trained(kind: str, task: Task, folder: Path) -> tuple[SplitModel, Path, Path]:
    """A trainer's model, where its backbone lies, and where it was exported to."""
    base, out = folder / "base", folder / "exported"
    model_of(kind, head=task is Task.CAUSAL_LM).save_pretrained(base)
    tokenizer().save_pretrained(base)
    loaded = load_backbone(str(base), task=task)
    assert isinstance(loaded, TorchBackbone)
    labels = LABELS if task in (Task.TEXT_CLASSIFICATION, Task.MULTI_LABEL) else ()
    model = SplitModel(loaded, spec(kind), task=task, labels=len(labels), seed=0)
    model.load(scattered(model))
    out.mkdir()
    for name, data in model.export(labels).items():
        (out / name).write_bytes(data)
    return model, base, out


def read(model: SplitModel) -> tuple[Tokens, dict[str, Any]]:
    tokens = model._view.text_input.read(texts(4, 2), 32)
    mask = torch.from_numpy(tokens.mask).long()
    return tokens, {"input_ids": torch.from_numpy(tokens.ids), "attention_mask": mask}


@pytest.mark.parametrize("kind", ["gpt2", "opt", "llama", "mixtral"])
def test_a_language_model_needs_nothing_of_ours(kind: str, tmp_path: Path) -> None:
    ours, base, out = trained(kind, Task.CAUSAL_LM, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(base)
    theirs = peft.PeftModel.from_pretrained(plain, out)
    tokens, given = read(ours)
    assert ours.head is not None
    with torch.no_grad():
        wanted = ours.head(ours.whole(tokens))
        found = theirs.eval()(**given).logits[torch.from_numpy(tokens.mask)]
        assert not torch.allclose(
            AutoModelForCausalLM.from_pretrained(base)(**given).logits[given["attention_mask"].bool()],
            wanted,
            atol=1e-2,
        )
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert theirs.generate(given["input_ids"][:1], max_new_tokens=2, do_sample=False).shape[1] > 2


@pytest.mark.parametrize("task", [Task.TEXT_CLASSIFICATION, Task.MULTI_LABEL, Task.REGRESSION])
@pytest.mark.parametrize("kind", ["bert", "opt"])
def test_what_classifies_or_values_texts_is_built_by_one_function(
    kind: str, task: Task, tmp_path: Path
) -> None:
    ours, _, out = trained(kind, task, tmp_path)
    base, reader = load_base(out)
    theirs = peft.PeftModel.from_pretrained(base, out)
    tokens, _ = read(ours)
    with torch.no_grad():
        wanted = ours.whole(tokens)
        found = theirs(**reader(texts(4, 2), padding=True, return_tensors="pt")).logits
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_pairs_and_texts_without_a_mask_are_answered_too(tmp_path: Path) -> None:
    ours, _, out = trained("bert", Task.TEXT_CLASSIFICATION, tmp_path)
    base, _ = load_base(out)
    theirs = peft.PeftModel.from_pretrained(base, out)
    pair = ours._view.text_input.read([("ba bo", "da")], 32)
    assert pair.segments is not None
    ids, segments = torch.from_numpy(pair.ids), torch.from_numpy(pair.segments)
    with torch.no_grad():
        found = theirs(input_ids=ids, token_type_ids=segments).logits
        torch.testing.assert_close(found, ours.whole(pair), rtol=1e-5, atol=1e-5)


def test_equal_weights_are_equal_bytes_and_training_goes_on_after_an_export(tmp_path: Path) -> None:
    ours, _, out = trained("bert", Task.TEXT_CLASSIFICATION, tmp_path)
    files = ours.export(LABELS)
    assert files == ours.export(LABELS) == {path.name: path.read_bytes() for path in out.iterdir()}
    config = json.loads(files["adapter_config.json"])
    assert config["peft_type"] == "LORA" and config["target_modules"] == ["query", "value"]
    assert (config["r"], config["lora_alpha"], config["modules_to_save"]) == (4, 8.0, ["head"])
    assert config["inference_mode"] and config["base_model_name_or_path"] == str(tmp_path / "base")
    assert all(one.requires_grad for one in ours.parameters.values())
    changed = {name: array + np.float32(1) for name, array in ours.arrays().items()}
    ours.load(changed)
    assert ours.export(LABELS)["adapter_model.safetensors"] != files["adapter_model.safetensors"]


def test_an_export_that_is_none_and_another_backbone_are_refused(tmp_path: Path) -> None:
    _, base, out = trained("bert", Task.TEXT_CLASSIFICATION, tmp_path)
    with pytest.raises(StateError, match="no export of a split model"):
        load_base(tmp_path)
    model_of("bert", seed=9).save_pretrained(tmp_path / "other")
    tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(BackboneError, match="are not the job's"):
        load_base(out, backbone=str(tmp_path / "other"))
    base.rename(tmp_path / "moved")
    load_base(out, backbone=str(tmp_path / "moved"))
    (out / ABOUT).write_bytes(b"{")
    with pytest.raises(StateError, match="no export of a split model"):
        load_base(out)


def test_of_a_language_model_there_is_no_base_of_ours(tmp_path: Path) -> None:
    *_, out = trained("gpt2", Task.CAUSAL_LM, tmp_path)
    with pytest.raises(StateError, match="AutoModelForCausalLM"):
        load_base(out)
