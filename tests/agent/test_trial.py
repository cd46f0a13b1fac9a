"""What is not as it should be is refused at load: layers, padding, vocabulary, code, configuration."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model, PreTrainedTokenizerFast

from broker_config.testing.inprocess import InProcessBroker
from sidestream.backbone.runtimes import load_backbone
from sidestream.backbone.torch_runtime.backbone import TorchBackbone
from sidestream.contract.errors import BackboneError
from sidestream.contract.plan import Precision
from tests.agent.fake_trainer import FakeTrainer
from tests.agent.fleet import Running
from tests.agent.tiny import LAYERS, SPECIAL, WORDS, _tokenizer
from tests.vectors import row_vectors

pytestmark = pytest.mark.slow

Tiny = Callable[[str], Path]
TEXTS = ["turn the lights on please", "off", "switch the kitchen light off now"]
VOCABULARY = len(SPECIAL) + len(WORDS)


def small(**more: Any) -> Any:
    torch.manual_seed(0)
    return BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=48,
        pad_token_id=1,
        initializer_range=0.3,
        **more,
    )


def said(folder: Path, changes: Mapping[str, Any], to: Path) -> str:
    """A copy of a saved model whose configuration says something else."""
    copy = shutil.copytree(folder, to)
    config = json.loads((copy / "config.json").read_text())
    for key, value in changes.items():
        config.pop(key, None) if value is None else config.update({key: value})
    (copy / "config.json").write_text(json.dumps(config))
    return load_backbone(str(copy)).fingerprint


class Rewritten(BertModel):  # type: ignore[misc]
    """A model whose layers are not what it reports: it has a second list of them."""

    def __init__(self, config: Any) -> None:
        super().__init__(config, add_pooling_layer=False)
        self.decoys = nn.ModuleList(nn.Linear(32, 32) for _ in range(LAYERS))

    def forward(self, *given: Any, **named: Any) -> Any:
        out = super().forward(*given, **named)
        for decoy in self.decoys:
            decoy(out.last_hidden_state)
        return out


class Looking(BertModel):  # type: ignore[misc]
    """A model that looks at padding."""

    def forward(self, *given: Any, attention_mask: Any = None, **named: Any) -> Any:
        return super().forward(*given, **named)


class Broken(BertModel):  # type: ignore[misc]
    """A model that fails in a pass."""

    def forward(self, *given: Any, **named: Any) -> Any:
        raise RuntimeError("mat1 and mat2\nhave nothing in common")


def test_of_several_lists_of_the_right_length_the_one_that_is_reported_is_read() -> None:
    model = Rewritten(small())
    model._modules = {"decoys": model.decoys, **model._modules}  # it is the first that is met
    plain = BertModel(small(), add_pooling_layer=False)
    plain.load_state_dict(model.state_dict(), strict=False)
    for layers in (0, 2):
        found = TorchBackbone(model, _tokenizer(decoder=False), layers=layers).forward(TEXTS, [1, 2], 32)
        wanted = TorchBackbone(plain, _tokenizer(decoder=False), layers=layers).forward(TEXTS, [1, 2], 32)
        assert np.array_equal(found.vectors, wanted.vectors)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Looking, r"layer 1's states of a text change with the padding of its batch"),
        (Broken, r"RuntimeError: mat1 and mat2; use another model"),
    ],
)
def test_what_fails_its_trial_is_refused_in_one_line(kind: Any, why: str) -> None:
    with pytest.raises(BackboneError, match=rf"^mine: a {kind.__name__} cannot .*{why}") as refused:
        TorchBackbone(kind(small(), add_pooling_layer=False), _tokenizer(decoder=False), name="mine")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "opt"])
def test_a_model_without_its_tokenizers_files_is_refused(tiny: Tiny, tmp_path: Path, family: str) -> None:
    folder = shutil.copytree(tiny(family), tmp_path / "bare")
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / file).unlink(missing_ok=True)
    with pytest.raises(BackboneError, match=r"knows 0 words.*beside it"):
        load_backbone(str(folder))


def test_a_vocabulary_that_was_cut_is_refused() -> None:
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *"abcdefgh"])}
    cut = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    cut.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=cut, unk_token="<unk>", pad_token="<pad>")
    with pytest.raises(BackboneError, match="knows 12 tokens of the 1000"):
        TorchBackbone(BertModel(BertConfig(**{**small().to_dict(), "vocab_size": 1000})), tokenizer)


def test_byte_pairs_without_their_merges_are_refused_and_with_them_taken(tmp_path: Path) -> None:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    texts = [" ".join(f"{a}{b}{c}" for c in WORDS) for a in WORDS[:8] for b in WORDS[8:]]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    )
    torch.manual_seed(0)
    model = GPT2Model(GPT2Config(vocab_size=600, n_embd=32, n_layer=LAYERS, n_head=4, n_positions=48))
    whole = TorchBackbone(model, PreTrainedTokenizerFast(tokenizer_object=made))
    assert whole.is_decoder
    state = json.loads(made.to_str())
    state["model"]["merges"] = []
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))
    with pytest.raises(BackboneError, match="cuts its own words to pieces"):
        TorchBackbone(model, bare)


def test_a_token_that_the_model_has_none_for_is_refused_unless_it_is_only_padding() -> None:
    tokenizer = _tokenizer(decoder=False)
    tokenizer.add_special_tokens({"pad_token": "<later>"})
    taken = TorchBackbone(BertModel(small(), add_pooling_layer=False), tokenizer)
    (alone,) = row_vectors(taken.forward(["off"], [LAYERS], 32))
    beside, _ = row_vectors(taken.forward(["off", "turn the <later> lights on"], [LAYERS], 32))
    torch.testing.assert_close(beside, alone, rtol=1e-4, atol=1e-4)
    tokenizer.add_tokens(["cellar"])
    with pytest.raises(BackboneError, match=f"has a token 25, and the model's highest is {VOCABULARY - 1}"):
        TorchBackbone(BertModel(small(), add_pooling_layer=False), tokenizer)


def test_texts_that_the_tokenizer_does_not_know_are_refused(
    bert: TorchBackbone, caplog: pytest.LogCaptureFixture
) -> None:
    bert.check_inputs(["turn the lights on"] * 8)
    bert.check_inputs(["Wie geht es Ihnen"])
    assert "does not know 100 %" in caplog.text
    with pytest.raises(BackboneError, match="100% of the words in this device's first 8 texts"):
        bert.check_inputs([("Wie geht es", "Ihnen")] * 8)


def test_data_that_the_tokenizer_does_not_know_ends_the_agent_before_it_announces_a_backbone(
    broker: InProcessBroker, trainer: FakeTrainer, bert: TorchBackbone, tmp_path: Path
) -> None:
    data = tmp_path / "train.jsonl"
    rows = [{"text": f"Morgen regnet es {number}mal", "label": "on"} for number in range(20)]
    data.write_text("\n".join(map(json.dumps, rows)) + "\n")
    trainer.publish_plan()
    with (
        Running(broker, bert, tmp_path, data={"path": str(data)}) as agent,
        pytest.raises(BackboneError, match="does not know 100% of the words in this device's first 20"),
    ):
        agent.join()
    trainer.wait(lambda t: t.statuses[-1][1].state == "offline")
    assert not any(status.fingerprint for _, status in trainer.statuses) and not trainer.received


def test_code_that_comes_with_a_model_is_never_run_and_never_asked_about(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *given: pytest.fail("it asks"))
    folder = shutil.copytree(tiny("bert"), tmp_path / "coded")
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.C", "AutoModel": "mine.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BackboneError, match=r"code of its own, which is never run here; use a model whose"):
        load_backbone(str(folder))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "changes",
    [{"num_attention_heads": 2}, {"hidden_act": "relu"}, {"layer_norm_eps": 0.1}, {"is_decoder": True}],
)
def test_a_configuration_that_computes_something_else_is_another_backbone(
    tiny: Tiny, tmp_path: Path, changes: dict[str, Any]
) -> None:
    assert said(tiny("bert"), changes, tmp_path / "other") != load_backbone(str(tiny("bert"))).fingerprint


def test_another_rotary_base_is_another_backbone_however_it_is_written(tiny: Tiny, tmp_path: Path) -> None:
    known = load_backbone(str(tiny("llama"))).fingerprint
    plain = {"rope_parameters": None, "rope_scaling": None}
    assert said(tiny("llama"), {**plain, "rope_theta": 10000.0}, tmp_path / "same") == known
    old = said(tiny("llama"), {**plain, "rope_theta": 500000}, tmp_path / "old")
    new = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    assert known != old == said(tiny("llama"), new, tmp_path / "new")


@pytest.mark.parametrize(
    "changes",
    [
        {"_name_or_path": "elsewhere", "transformers_version": "4.1.0", "architectures": ["BertForMaskedLM"]},
        {"id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0, "b": 1, "c": 2}},
        {"hidden_dropout_prob": 0.3, "initializer_range": 0.5, "use_cache": False, "dtype": None},
        {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "a_field_of_tomorrow": True},
        {"hidden_act": None, "layer_norm_eps": None},
    ],
)
def test_names_labels_training_and_defaults_are_not_a_part_of_the_fingerprint(
    tiny: Tiny, tmp_path: Path, changes: dict[str, Any]
) -> None:
    assert said(tiny("bert"), changes, tmp_path / "same") == load_backbone(str(tiny("bert"))).fingerprint


def test_another_fingerprint_is_refused(bert: TorchBackbone) -> None:
    bert.check(bert.fingerprint)
    with pytest.raises(BackboneError, match="are not the job's"):
        bert.check("0" * 32)


def test_the_second_text_of_a_pair_is_told_from_the_first() -> None:
    model = BertModel(small(), add_pooling_layer=False)
    backbone = TorchBackbone(model, _tokenizer(decoder=False))
    backbone.text_input.tokenizer = Pairs(backbone.text_input.tokenizer)
    found = backbone.forward([("lights on", "heat up"), "lights on"], [LAYERS], 32)
    with torch.no_grad():
        ids = torch.tensor([[0, 8, 12, 2, 16, 17, 2]])
        segments = torch.tensor([[0, 0, 0, 0, 1, 1, 1]])
        told = model(input_ids=ids, token_type_ids=segments).last_hidden_state
        untold = model(input_ids=ids).last_hidden_state
    pair, beside = row_vectors(found)
    torch.testing.assert_close(pair[0], told[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(told, untold, rtol=1e-2, atol=1e-2)
    (single,) = row_vectors(backbone.forward(["lights on"], [LAYERS], 32))
    torch.testing.assert_close(beside, single, rtol=1e-4, atol=1e-4)


class Pairs:
    """A tokenizer with marks around both texts of a pair."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __call__(self, texts: list[Any], **how: Any) -> dict[str, list[list[int]]]:
        rows: list[list[int]] = []
        segments: list[list[int]] = []
        for text in texts:
            first, *rest = [text] if isinstance(text, str) else text
            row = self._inner(first)["input_ids"]
            more = self._inner(rest[0])["input_ids"][1:] if rest else []
            rows.append(row + more)
            segments.append([0] * len(row) + [1] * len(more))
        return {"input_ids": rows, "token_type_ids": segments}


@pytest.mark.parametrize("precision", ["int8", "bf16"])
def test_a_conversion_lets_go_of_the_weights_as_they_were_loaded(tiny: Tiny, precision: Precision) -> None:
    import gc
    import weakref

    from transformers import AutoModel

    from sidestream.backbone.torch_runtime.saved_model import read_model

    model, tokenizer = read_model(str(tiny("bert")), AutoModel)
    linear = [weakref.ref(one) for one in model.modules() if isinstance(one, nn.Linear)]
    gc.disable()
    try:
        backbone = TorchBackbone(model, tokenizer, precision=precision)
        assert linear and all((one() is None) == (precision == "int8") for one in linear)
    finally:
        gc.enable()
    assert np.isfinite(backbone.forward(TEXTS, [LAYERS], 32).vectors).all()
