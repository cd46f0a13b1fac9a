"""The trainer's part of a language model: its head alone, from its file, answering as the model does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from side_trainer.side_tuning.output_heads import FOLDER, Heads, read_head
from sidestream.contract.errors import BackboneError, StateError
from tests.agent.tiny import save_tiny
from tests.agent.tiny_lm import FAMILIES, VOCABULARY, save_tiny_lm


@pytest.mark.parametrize("family", FAMILIES)
def test_every_familys_head_gives_the_models_logits(tmp_path: Path, family: str) -> None:
    folder = save_tiny_lm(tmp_path, family)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    seen: dict[str, torch.Tensor] = {}
    stack = next(one for one in model.modules() if isinstance(one, torch.nn.ModuleList))
    stack[-1].register_forward_hook(lambda module, given, out: seen.update(last=out))
    with torch.no_grad():
        logits = model(torch.tensor([[0, 5, 9, 12, 7]])).logits
    last = seen["last"][0] if isinstance(seen["last"], tuple) else seen["last"]
    torch.testing.assert_close(read_head(str(folder))(last), logits, rtol=1e-5, atol=1e-5)


def test_a_copy_serves_when_the_backbone_is_gone(tmp_path: Path) -> None:
    folder = save_tiny_lm(tmp_path / "model", "llama")
    facts = Heads(tmp_path).take(str(folder))
    assert facts.vocabulary == VOCABULARY
    for file in folder.iterdir():
        file.unlink()
    again = Heads(tmp_path)
    assert again.nbytes == 0
    assert again.get(facts.fingerprint).fingerprint() == facts.fingerprint
    assert again.get(facts.fingerprint) is again.get(facts.fingerprint)
    assert again.nbytes == 4 * 32 * (VOCABULARY + 1)


def test_a_damaged_or_missing_copy_is_told(tmp_path: Path) -> None:
    facts = Heads(tmp_path).take(str(save_tiny_lm(tmp_path / "model", "gpt2")))
    copy = tmp_path / FOLDER / f"{facts.fingerprint}.safetensors"
    data = bytearray(copy.read_bytes())
    data[-5] ^= 1
    copy.write_bytes(data)
    with pytest.raises(StateError, match="damaged"):
        Heads(tmp_path).get(facts.fingerprint)
    copy.unlink()
    with pytest.raises(StateError, match="cannot be read"):
        Heads(tmp_path).get(facts.fingerprint)


def test_a_model_in_shards_is_read_from_the_shards_that_matter(tmp_path: Path) -> None:
    folder = save_tiny_lm(tmp_path, "qwen3")
    whole = read_head(str(folder)).fingerprint()
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="10KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {index[name] for name in ("model.norm.weight", "lm_head.weight")}
    for shard in set(index.values()) - needed:
        (folder / shard).unlink()
    assert read_head(str(folder)).fingerprint() == whole


def test_a_model_in_the_hubs_cache_is_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--some--lm"
    save_tiny_lm(cached / "snapshots" / "abc", "opt")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    assert read_head("some/lm").vocabulary == VOCABULARY
    with pytest.raises(BackboneError, match="not in the Hugging Face cache"):
        read_head("some/other")


def test_what_is_no_decoder_is_refused_in_words(tmp_path: Path) -> None:
    save_tiny(tmp_path / "bert", "bert")
    with pytest.raises(BackboneError, match=r"no output head.*a decoder"):
        read_head(str(tmp_path / "bert"))
    with pytest.raises(BackboneError, match="no such folder"):
        read_head(str(tmp_path / "nothing"))
    (tmp_path / "bert" / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(BackboneError, match="cannot be read"):
        read_head(str(tmp_path / "bert"))
