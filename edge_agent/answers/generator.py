"""Text from a frozen decoder with an adopted side-network beside it, token after token.

The backbone keeps keys and values, so each step computes one token; the side-network looks at that token's
taps alone. With a side-network that adds nothing, greedy tokens are those of transformers' ``generate``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Final

import msgspec
import numpy as np

from sidestream.backbone.language_model import LanguageModel
from sidestream.contract.errors import ConfigError
from sidestream.contract.tensors import Floats
from sidestream.contract.wire import prepared
from sidestream.side_network.inference import InferenceNetwork

_UNFINISHED: Final = "�"  # of a character whose bytes have not all come yet


@prepared
class GenerationOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to choose tokens, and when to stop."""

    max_tokens: Annotated[int, msgspec.Meta(ge=1)] = 128
    """Generate at most so many."""
    temperature: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """Logits are divided by it before a token is drawn; 0: always the likeliest token."""
    top_k: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Draw from the so many likeliest tokens only; 0: from all."""
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    """Draw from the fewest tokens only that have so much probability together."""
    seed: Annotated[int, msgspec.Meta(ge=0, le=2**62)] | None = None
    """The same seed draws the same tokens; none: other ones every time."""
    stop: tuple[str, ...] = ()
    """Texts that end the generation; they are not given out."""


def read_options(options: Mapping[str, Any]) -> GenerationOptions:
    """Options by name.

    Raises:
        ConfigError: naming the one that is wrong.
    """
    try:
        return msgspec.convert(dict(options), type=GenerationOptions)
    except msgspec.ValidationError as exc:
        what, _, where = str(exc).partition(" - at `$.")
        raise ConfigError(where.rstrip("`") or "options", what[:1].lower() + what[1:]) from exc


class Generator:
    """Generates with one version of the side-network.

    Args:
        model: The frozen decoder.
        network: The side-network; None for the decoder alone.
        align: Its alignment map for this decoder.
        taps: Layers tapped.
    """

    def __init__(
        self, model: LanguageModel, network: InferenceNetwork | None, align: str, taps: Sequence[int]
    ) -> None:
        self._model = model
        self._network = network
        self._align = align
        self._taps = taps

    def tokens(self, prompt: Sequence[int], options: GenerationOptions) -> Iterator[int]:
        """The tokens that follow a prompt's, without the one that ends the text.

        Raises:
            ConfigError: the prompt is empty, or longer than the model can see.
        """
        if not prompt:
            raise ConfigError(
                "prompt", "is empty, and the tokenizer begins texts with no token; write a word"
            )
        if len(prompt) >= self._model.longest:
            raise ConfigError(
                "prompt",
                f"has {len(prompt)} tokens; the model can see {self._model.longest}, one less as a prompt",
            )
        generator = np.random.default_rng(options.seed)
        decoding, shown = self._model.decoding(self._taps), list(prompt)
        for _ in range(min(options.max_tokens, self._model.longest - len(prompt))):
            token = _draw(self._logits(decoding.feed(shown)), options, generator)
            if token in self._model.ends:
                return
            yield token
            shown = [token]

    def stream(self, prompt: str, options: GenerationOptions) -> Iterator[str]:
        """The text that follows a prompt, piece by piece.

        Raises:
            ConfigError: as :meth:`tokens`.
        """
        start = self._model.tokens(prompt)
        before, grown, given = self._model.text(start), list(start), 0
        for token in self.tokens(start, options):
            grown.append(token)
            text = self._model.text(grown)[len(before) :]
            end = _end_of(text, options.stop)
            if end is not None:
                if end > given:
                    yield text[given:end]
                return
            ready = len(text) - _held_back(text, options.stop)
            if ready > given:
                yield text[given:ready]
                given = ready
        rest = self._model.text(grown)[len(before) :][given:]
        if rest:
            yield rest

    def _logits(self, taps: Floats) -> Floats:
        """[B, 1, d] -> [V]."""
        states = taps[-1] if self._network is None else self._network.refine(self._align, taps)
        logits: Floats = self._model.logits(states)[0]
        return logits


def _draw(logits: Floats, options: GenerationOptions, generator: np.random.Generator) -> int:
    if options.temperature == 0:
        return int(logits.argmax())
    order = np.argsort(-logits, kind="stable")[: options.top_k or None]
    with np.errstate(over="ignore"):  # of a tiny temperature: all but the likeliest become impossible
        scaled = (logits[order].astype(np.float64) - logits.max()) / options.temperature
    shares = np.exp(scaled) / np.exp(scaled).sum()
    if options.top_p < 1:
        shares[shares.cumsum() - shares >= options.top_p] = 0.0
    return int(generator.choice(order, p=shares / shares.sum()))


def _end_of(text: str, stops: Sequence[str]) -> int | None:
    """Where the first of the stops begins in the text."""
    found = [at for stop in stops if stop and (at := text.find(stop)) >= 0]
    return min(found, default=None)


def _held_back(text: str, stops: Sequence[str]) -> int:
    """Characters at the end that may yet turn out otherwise: half a character, or the beginning of a stop."""
    if text.endswith(_UNFINISHED):
        return len(text) - len(text.rstrip(_UNFINISHED))
    return max(
        (
            length
            for stop in stops
            for length in range(1, min(len(stop), len(text) + 1))
            if text.endswith(stop[:length])
        ),
        default=0,
    )
