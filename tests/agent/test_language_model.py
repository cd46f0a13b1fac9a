"""A frozen decoder beside its head predicts and generates as transformers does, and samples its tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from edge_agent.answers.generator import GenerationOptions, Generator, read_options
from side_trainer.side_tuning.output_heads import read_head
from sidestream.backbone.runtimes import load_backbone
from sidestream.backbone.torch_runtime.language_model import TorchLanguageModel
from sidestream.backbone.windows import Window
from sidestream.contract.errors import BackboneError, ConfigError
from sidestream.contract.plan import SideNetworkSpec
from sidestream.contract.sampling import parse_sampling
from sidestream.contract.tasks import NO_TARGET, Task
from sidestream.side_network.inference import InferenceNetwork
from sidestream.side_network.network import SideNetwork
from tests.agent.tiny import LAYERS, POSITIONS, WIDTH, save_tiny
from tests.agent.tiny_lm import FAMILIES, save_tiny_lm
from tests.vectors import answering, row_vectors

pytestmark = pytest.mark.slow

PROMPT = "turn the kitchen light"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("lm")
    return lambda family: (
        folder / family if (folder / family).exists() else save_tiny_lm(folder / family, family)
    )


@pytest.fixture(params=FAMILIES)
def folder(saved: Callable[[str], Path], request: pytest.FixtureRequest) -> Path:
    return saved(request.param)


@pytest.fixture(scope="module")
def llama(saved: Callable[[str], Path]) -> TorchLanguageModel:
    return TorchLanguageModel.load(str(saved("llama")))


def network(*, blocks: int = 3, trained: bool = False) -> InferenceNetwork:
    made = SideNetwork(SideNetworkSpec(blocks=blocks, width=8), labels=0, seed=1, task=Task.CAUSAL_LM)
    made.add_align("m", WIDTH)
    if trained:
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if name.startswith("outs."):
                    parameter.normal_(generator=torch.Generator().manual_seed(5))
    return answering(made, Task.CAUSAL_LM)


def every(lengths: Any) -> Any:
    return parse_sampling("all")


def generated(
    model: TorchLanguageModel,
    layers: int = LAYERS,
    trained: bool = False,
    prompt: str = PROMPT,
    **options: Any,
) -> list[int]:
    taps = (1, layers) if layers > 1 else (1,)
    generator = Generator(model, network(trained=trained), "m", taps)
    return list(generator.tokens(model.tokens(prompt), GenerationOptions(**options)))


@pytest.mark.slow
def test_greedy_tokens_beside_an_untrained_side_network_are_those_of_transformers(folder: Path) -> None:
    model = TorchLanguageModel.load(str(folder))
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    lengths = []
    for prompt in (PROMPT, "the", "now please turn heat up"):
        ids = torch.tensor([model.tokens(prompt)])
        with torch.no_grad():
            out = theirs.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False, pad_token_id=1
            )
        expected = [token for token in out[0, ids.shape[1] :].tolist() if token != 2]
        ours = generated(model, max_tokens=16, prompt=prompt)
        assert ours == expected
        lengths.append(len(ours))
    assert max(lengths) > 3


def test_losses_of_a_batch_of_unequal_windows_are_the_models(folder: Path) -> None:
    model = TorchLanguageModel.load(str(folder))
    windows = [Window([0, 5, 9, 12, 7], [5, 9, 12, 7, 6]), Window([0, 8, 4], [NO_TARGET, 4, 11])]
    sampled = model.forward_windows(windows, (1, LAYERS), every)
    assert sampled.targets is not None and sampled.lengths.tolist() == [5, 2]
    losses, _ = model.judge(sampled.vectors[-1], sampled.targets)
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    expected = []
    for window in windows:
        with torch.no_grad():
            logits = theirs(torch.tensor([window.inputs])).logits[0]
        each = functional.cross_entropy(logits, torch.tensor(window.targets), reduction="none")
        expected.append(each[torch.tensor(window.targets) != NO_TARGET])
    torch.testing.assert_close(torch.from_numpy(losses), torch.cat(expected), rtol=1e-3, atol=1e-4)


def test_device_and_trainer_find_the_same_head(folder: Path) -> None:
    assert TorchLanguageModel.load(str(folder)).head_fingerprint == read_head(str(folder)).fingerprint()


def test_a_truncated_decoder_keeps_the_head_and_generates(folder: Path) -> None:
    whole, model = TorchLanguageModel.load(str(folder)), TorchLanguageModel.load(str(folder), 2)
    assert model.depth == 2 and model.fingerprint != whole.fingerprint
    assert model.head_fingerprint == whole.head_fingerprint
    assert generated(model, layers=2, max_tokens=6, trained=True) == generated(
        model, layers=2, max_tokens=6, trained=True
    )


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_other_precisions_generate_and_keep_the_fingerprints(
    saved: Callable[[str], Path], llama: TorchLanguageModel, precision: Any
) -> None:
    model = TorchLanguageModel.load(str(saved("llama")), 0, precision)
    assert (model.fingerprint, model.head_fingerprint) == (llama.fingerprint, llama.head_fingerprint)
    assert len(generated(model, max_tokens=4, trained=True)) > 0


def test_a_models_fingerprint_is_its_layers_and_its_head_has_one_of_its_own(
    saved: Callable[[str], Path],
) -> None:
    tied, untied = str(saved("gpt2")), str(saved("qwen3"))
    heads = set()
    for folder in (tied, untied):
        model = TorchLanguageModel.load(folder)
        assert model.fingerprint == load_backbone(folder).fingerprint != model.head_fingerprint
        heads.add(model.head_fingerprint)
    assert len(heads) == 2


def test_what_is_no_language_model_is_refused_in_words(
    tmp_path: Path, llama: TorchLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path, "bert")
    with pytest.raises(BackboneError, match=str(tmp_path)):
        TorchLanguageModel.load(str(tmp_path))
    with pytest.raises(BackboneError, match="give both the same model"):
        llama.check_head("0" * 32)
    monkeypatch.setattr(
        "sidestream.side_network.output_head._spec", lambda config, norm: type(llama.head.spec)(norm="layer")
    )
    with pytest.raises(BackboneError, match="of a kind that is not known"):
        TorchLanguageModel.load(llama.name)


@pytest.mark.parametrize("policy", ["random:0.5", "hardest:0.5", "random:3", "all"])
def test_a_share_of_the_tokens_travels_and_windows_do_not_disturb_each_other(
    llama: TorchLanguageModel, policy: str
) -> None:
    windows = [
        Window([0, 5, 9, 12, 7, 8], [5, 9, 12, 7, 8, 6]),
        Window([0, 8, 4], [NO_TARGET, 4, 11]),
        Window([3, 3], [NO_TARGET, 9]),
    ]
    sampling = parse_sampling(policy)
    together = llama.forward_windows(windows, (1, LAYERS), lambda lengths: sampling)
    whole = llama.forward_windows(windows, (1, LAYERS), every)
    expected = {"random:0.5": [3, 1, 1], "hardest:0.5": [3, 1, 1], "random:3": [3, 2, 1], "all": [6, 2, 1]}
    assert together.lengths.tolist() == expected[policy]
    assert together.targets is not None and whole.targets is not None
    told = np.split(together.targets, np.cumsum(together.lengths)[:-1])
    for row, targets, window in zip(row_vectors(together), told, windows, strict=True):
        alone = llama.forward_windows([window], (1, LAYERS), lambda lengths: sampling)
        assert alone.targets is not None
        assert targets.tolist() == alone.targets.tolist() and NO_TARGET not in targets
        torch.testing.assert_close(row, torch.from_numpy(alone.vectors), rtol=1e-4, atol=1e-5)
    if policy == "hardest:0.5":
        losses, _ = llama.judge(whole.vectors[-1, :6], whole.targets[:6])
        worst = np.sort(np.argsort(-losses)[:3])
        assert told[0].tolist() == whole.targets[worst].tolist()


def test_a_seed_draws_the_same_and_another_one_others(llama: TorchLanguageModel) -> None:
    drawn = {
        seed: generated(llama, max_tokens=20, temperature=1.5, seed=seed, trained=True) for seed in (1, 2)
    }
    assert drawn[1] == generated(llama, max_tokens=20, temperature=1.5, seed=1, trained=True) != drawn[2]


def test_top_k_of_one_a_tiny_top_p_and_the_tiniest_temperature_are_greedy(llama: TorchLanguageModel) -> None:
    greedy = generated(llama, max_tokens=12, trained=True)
    assert generated(llama, max_tokens=12, temperature=2.0, top_k=1, trained=True) == greedy
    assert generated(llama, max_tokens=12, temperature=2.0, top_p=1e-6, trained=True) == greedy
    assert generated(llama, max_tokens=12, temperature=1e-320, trained=True) == greedy


@pytest.mark.slow
def test_draws_follow_the_distribution_that_the_options_leave() -> None:
    from edge_agent.answers.generator import _draw

    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    generator = np.random.default_rng(0)

    def shares(**options: Any) -> list[float]:
        made = GenerationOptions(temperature=options.pop("temperature", 1.0), **options)
        drawn = [_draw(logits, made, generator) for _ in range(4000)]
        return [drawn.count(token) / 4000 for token in range(4)]

    assert shares() == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.04)
    assert shares(top_k=2) == pytest.approx([0.625, 0.375, 0, 0], abs=0.04)
    assert shares(top_p=0.6) == pytest.approx([0.625, 0.375, 0, 0], abs=0.04)
    assert shares(temperature=0.5) == pytest.approx([0.685, 0.247, 0.062, 0.007], abs=0.04)


def test_it_ends_where_the_model_has_no_room_left_and_says_when_a_prompt_is_too_long(
    llama: TorchLanguageModel,
) -> None:
    long = ["the"] * (POSITIONS - 3)
    generator = Generator(llama, network(trained=True), "m", (1, LAYERS))
    tokens = list(generator.tokens(llama.tokens(" ".join(long)), GenerationOptions(max_tokens=50)))
    assert len(tokens) <= 3
    with pytest.raises(ConfigError, match="prompt: has 60 tokens; the model can see 48"):
        next(generator.stream(" ".join(["the"] * 60), GenerationOptions()))
    with pytest.raises(ConfigError, match="prompt: is empty"):
        next(generator.stream("", GenerationOptions()))


class Spelling(TorchLanguageModel):
    """A model whose tokens are bytes, and that says what it is told to."""

    def __init__(self, said: str) -> None:
        self.said = list(said.encode())

    def tokens(self, text: str) -> list[int]:
        return list(text.encode())

    def text(self, tokens: Any) -> str:
        return bytes(tokens).decode(errors="replace")


def streamed(said: str, *stop: str) -> list[str]:
    model = Spelling(said)
    generator = Generator(model, network(), "m", (1,))

    def tokens(prompt: Any, options: Any) -> Iterator[int]:
        return iter(model.said)

    generator.tokens = tokens  # type: ignore[method-assign]
    return list(generator.stream("say ", GenerationOptions(stop=stop)))


def test_text_comes_in_whole_characters_and_all_of_it() -> None:
    pieces = streamed("größer 中 🙂")
    assert "".join(pieces) == "größer 中 🙂" and "ö" in pieces and "🙂" in pieces


def test_a_stop_ends_the_text_and_nothing_of_it_shows() -> None:
    assert "".join(streamed("one two. three. four", ". t")) == "one two"
    assert "".join(streamed("abcabd", "abd", "zz")) == "abc"
    assert "".join(streamed("no stop here ab", "abd")) == "no stop here ab"


@pytest.mark.parametrize(
    ("name", "value"), [("top_p", 0), ("temperature", -1), ("max_tokens", "x"), ("seed", -1), ("beams", 4)]
)
def test_an_option_that_is_none_is_named(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        read_options({name: value})
    assert read_options({"max_tokens": 3, "stop": ["a"]}).stop == ("a",)
