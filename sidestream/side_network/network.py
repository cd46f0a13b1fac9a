"""The side-network: a small ladder beside a frozen backbone, shared by backbones of unequal depth and width.

After Fed MobiLLM (arXiv 2508.06765, section IV) and Ladder Side-Tuning (arXiv 2206.06522). Per tap ``b`` the
backbone's activation is normalised, mapped to the side-network's width by an alignment map that the trainer
owns (one per backbone family, never one per device), mixed with what came from the tap below, and passed
through an adapter that starts as the identity::

    a_b = P_b · norm(A_b)
    s_b = (1 − μ_b)·a_b + μ_b·h_{b−1},   μ_b = sigmoid(α_b),   s_1 = a_1
    h_b = s_b + W_up·gelu(W_down·norm(s_b))

Each block has a norm and head of its own, which start at zero, and adds to the answer of the block below::

    answer_b = answer_{b−1} + head_b(norm_b(mean of h_b over the row's vectors)),   answer_0 = 0

or, in tasks with an answer for every vector, ``head_b(norm_b(h_b))``, so that a deep answer that learnt
nothing is the shallow one. Blocks from number ``apart`` stand apart: they
see their own tap alone, s_b = a_b, and add half of what they say, which is to be an answer by itself
(docs/decisions/0020)::

    answer_b = answer_{b−1} + ½·alone_b,   alone_b = head_b(norm_b(mean of h_b))

A classifier's answer may have a linear start beside it, in closed form and not learnt with the rest: what its
taps alone say, of rows of B taps of one family (docs/decisions/0027)::

    answer = answer_B + Σ_b norm(mean of norm(A_b))·L_b + c

A language model keeps the backbone's own head, which takes its last state with something added, nothing at
first: W_out, one a backbone family, starts at zero (:meth:`SideNetwork.lifted`)::

    answer = backbone head(A_b + |A_b|·W_out·norm(h_b)),   |A|: the root of the mean square of A

A row leaves at its own last tap. Taps are nested (:func:`sidestream.contract.plan.nested_taps`), so a deep
backbone's row can be asked for the answer of a shallower one on its way: so every upload trains the shallow
tiers too.

Legend: B taps, K rows, N vectors a row (padded), d the backbone's width, r the side-network's, C numbers in
an answer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from sidestream.contract.errors import DecodeError
from sidestream.contract.plan import SideNetworkSpec
from sidestream.contract.tasks import TASKS, Task
from sidestream.contract.tensors import Floats
from sidestream.side_network.bundle import Bundle
from sidestream.side_network.form import APART_SHARE, align_key, align_name, stands_apart, start_key
from sidestream.side_network.initial import initial


class _Align(nn.Module):
    """Maps one backbone family's taps into the side-network, each tap by a matrix of its own."""

    def __init__(self, blocks: int, width: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(blocks, width, out))
        self.bias = nn.Parameter(torch.zeros(blocks, out))

    def forward(self, taps: Tensor, dropout: float) -> Iterator[Tensor]:
        """[B, K, N, d] -> of each tap [K, N, r].

        The matrices are taken apart once: the gradient of each one alone would be as large as all of them.
        """
        for values, weight, bias in zip(taps, self.weight.unbind(), self.bias.unbind(), strict=False):
            normed = functional.layer_norm(values, values.shape[-1:])
            yield (_dropout(normed, dropout) if self.training else normed) @ weight + bias


class _Linear(nn.Linear):
    """Zeros at first: nothing is drawn from torch's generator, which all threads share."""

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            nn.init.zeros_(parameter)


class _Adapter(nn.Module):
    """h = s + W_up·gelu(W_down·norm(s)); W_up starts at zero, so it starts as the identity."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.down = _Linear(width, inner)
        self.up = _Linear(inner, width)

    def forward(self, hidden: Tensor) -> Tensor:
        lifted: Tensor = self.up(functional.gelu(self.down(self.norm(hidden))))
        return hidden + lifted


class _Step(nn.Module):
    """What a block adds to the answer; nothing at first."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.head = _Linear(width, outputs)

    def forward(self, hidden: Tensor, dropout: float) -> Tensor:
        added: Tensor = self.head(functional.dropout(self.norm(hidden), dropout, self.training))
        return added


class _Start(nn.Module):
    """A linear answer of a row's taps. Buffers, not parameters: nothing here is learnt by gradients."""

    weight: Tensor
    bias: Tensor

    def __init__(self, taps: int, width: int, outputs: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(taps, width, outputs))
        self.register_buffer("bias", torch.zeros(outputs))

    def forward(self, taps: Tensor, mask: Tensor) -> Tensor:
        """[B, K, N, d] and [K, N] -> [K, C]."""
        normed = functional.layer_norm(taps, taps.shape[-1:])
        real = mask[:, :, None].to(taps.dtype)
        means = (normed * real).sum(dim=2) / real.sum(dim=1)
        features = functional.layer_norm(means, means.shape[-1:])
        return torch.einsum("bkd,bdc->kc", features, self.weight) + self.bias


class Answers(NamedTuple):
    """What a side-network says of some rows."""

    by_taps: dict[int, Tensor]
    """By number of taps b: the answers of the K_b first rows, [K_b, C] or [K_b, N, C]."""
    alone: dict[int, Tensor]
    """The same, of block number b by its own tap alone, where that block stands apart."""


class SideNetwork(nn.Module):
    """The shared side-network with the alignment maps of some backbone families.

    Args:
        spec: Its shape.
        labels: How many labels the job has.
        seed: Decides the initial weights.
        dropout: On normalised activations and before the head, while training.
        task: Decides C, and whether a row has one answer or every vector has.
    """

    def __init__(
        self,
        spec: SideNetworkSpec,
        *,
        labels: int,
        seed: int,
        dropout: float = 0.0,
        task: Task = Task.TEXT_CLASSIFICATION,
    ) -> None:
        super().__init__()
        self.spec = spec
        self._task = TASKS[task]
        self.seed = seed
        self.dropout = dropout
        self.aligns = nn.ModuleDict()
        self.starts = nn.ModuleDict()
        self._outputs = 0 if self._task.generates else self._task.outputs(labels)
        self.gates = nn.Parameter(torch.zeros(spec.blocks - 1))
        self.adapters = nn.ModuleList(_Adapter(spec.width, spec.inner) for _ in range(spec.blocks))
        if self._task.generates:
            self.norm = nn.LayerNorm(spec.width)
            self.outs = nn.ModuleDict()
        else:
            self.steps = nn.ModuleList(_Step(spec.width, self._outputs) for _ in range(spec.blocks))
        for block, adapter in enumerate(self.adapters):
            assert isinstance(adapter, _Adapter)
            self._begin(f"adapters.{block}.down.weight", adapter.down.weight)

    def add_align(self, name: str, width: int) -> None:
        """Add the alignment map ``name``, and the way back, for backbones of hidden size ``width``.

        Its initial weights depend on the seed and the name, not on when it is added.
        """
        key = align_key(name)
        align = self.aligns[key] = _Align(self.spec.blocks, width, self.spec.width)
        self._begin(f"aligns.{key}.weight", align.weight)
        if self._task.generates:
            self.outs[key] = _Linear(self.spec.width, width, bias=False)

    def _begin(self, name: str, parameter: Tensor) -> None:
        """Give a parameter its initial values, if it has any."""
        if not parameter.is_meta:
            with torch.no_grad():
                parameter.copy_(torch.from_numpy(initial(self.seed, name, tuple(parameter.shape))))

    def add_start(self, name: str, taps: int) -> None:
        """Add a linear start, of zeros, for rows of so many taps that go by the alignment map ``name``."""
        align = self.aligns[align_key(name)]
        assert isinstance(align, _Align)
        self.starts[start_key(name, taps)] = _Start(taps, align.weight.shape[1], self._outputs)

    def set_start(self, name: str, weight: Floats, bias: Floats) -> None:
        """Give a linear start its weights [B, d, C] and bias [C]; there may have been others."""
        if self._start(name, len(weight)) is None:
            self.add_start(name, len(weight))
        start = self._start(name, len(weight))
        assert start is not None
        start.weight.copy_(torch.from_numpy(weight))
        start.bias.copy_(torch.from_numpy(bias))

    def _start(self, name: str, taps: int) -> _Start | None:
        key = start_key(name, taps)
        if key not in self.starts:
            return None
        found = self.starts[key]
        assert isinstance(found, _Start)
        return found

    @property
    def align_names(self) -> list[str]:
        """The alignment maps it has."""
        return [align_name(key) for key in self.aligns]

    def forward(
        self, families: Sequence[tuple[str, Tensor]], mask: Tensor, exits: Collection[int] = ()
    ) -> dict[int, Tensor]:
        """Run rows of any backbones together.

        Args:
            families: Alignment map and taps [B', K', N, d] of rows that share both, in order of falling B';
                the K' add up to K.
            mask: [K, N] bool, the families' rows in order: which vectors are real; one a row at least.
            exits: Numbers of taps to answer at, besides those at which a family ends.

        Returns:
            By number of taps b: the answers of the K_b first rows, those with b taps or more: [K_b, C], or
            [K_b, N, C] where the task has an answer for every vector.
        """
        by_taps = self.answers(families, mask, exits).by_taps
        return {taps: answer + self._started(families, mask, taps) for taps, answer in by_taps.items()}

    def answers(
        self, families: Sequence[tuple[str, Tensor]], mask: Tensor, exits: Collection[int] = ()
    ) -> Answers:
        """What is learnt: as :meth:`forward` without linear starts, and what blocks say that stand apart."""
        wanted = {*exits, *(len(taps) for _, taps in families)}
        found, answer = Answers({}, {}), None
        for taps, hidden in self.trunk(families, range(1, self.spec.blocks + 1)):
            added = self.steps[taps - 1](self._pooled(hidden, mask), self.dropout)
            if answer is not None and stands_apart(self.spec, self._task, taps):
                found.alone[taps] = added
                added = APART_SHARE * added
            answer = added if answer is None else answer[: len(added)] + added
            if taps in wanted:
                found.by_taps[taps] = answer
        return found

    def _started(self, families: Sequence[tuple[str, Tensor]], mask: Tensor, taps: int) -> Tensor | float:
        """[K_b, C]: what linear starts say of the rows with ``taps`` taps or more, 0 where there is none."""
        if not self.starts:
            return 0.0
        parts, first = [], 0
        for name, values in families:
            if len(values) < taps:
                break
            rows, start = slice(first, first := first + values.shape[1]), self._start(name, taps)
            none = values.new_zeros(values.shape[1], self._outputs)
            parts.append(none if start is None else start(values[:taps], mask[rows]))
        return torch.cat(parts)

    def trunk(
        self, families: Sequence[tuple[str, Tensor]], exits: Collection[int] = ()
    ) -> Iterator[tuple[int, Tensor]]:
        """As :meth:`forward`, up to the head: numbers of taps b, rising, with h_b [K_b, N, r]."""
        exits = {*exits, *(len(taps) for _, taps in families)}
        hidden = torch.empty(0)
        mapped = [self.aligns[align_key(name)](taps, self.dropout) for name, taps in families]
        for tap, adapter in enumerate(self.adapters):
            active = [next(each) for each, (_, taps) in zip(mapped, families, strict=True) if len(taps) > tap]
            if not active:
                break
            mixed = torch.cat(active)
            if tap and not stands_apart(self.spec, self._task, tap + 1):
                gate = torch.sigmoid(self.gates[tap - 1])
                mixed = (1 - gate) * mixed + gate * hidden[: len(mixed)]
            hidden = adapter(mixed)
            if tap + 1 in exits:
                yield tap + 1, hidden

    def _pooled(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """[K_b, N, r] and [K, N] -> [K_b, r], or as it is where every vector has an answer."""
        if self._task.per_vector:
            return hidden
        real = mask[: len(hidden), :, None].to(hidden.dtype)
        return (hidden * real).sum(dim=1) / real.sum(dim=1)

    def lifted(self, align: str, hidden: Tensor, states: Tensor) -> Tensor:
        """What a language model's head is given: its last states […, d] with h_b […, r] added to them."""
        normed = functional.dropout(self.norm(hidden), self.dropout, self.training)
        added: Tensor = self.outs[align_key(align)](normed)
        return states + states.square().mean(dim=-1, keepdim=True).sqrt() * added

    def refine(self, align: str, taps: Tensor) -> Tensor:
        """One family's taps [B', K, N, d] -> its last states, lifted: [K, N, d]."""
        hidden = dict(self.trunk([(align, taps)]))[len(taps)]
        return self.lifted(align, hidden, taps[-1])

    def predict(self, align: str, taps: Tensor, mask: Tensor) -> Tensor:
        """One family's taps [B', K, N, d] and mask [K, N] -> the answers at its last tap."""
        return self.forward([(align, taps)], mask)[len(taps)]

    def arrays(self) -> dict[str, Floats]:
        """Every parameter by name, as float32 arrays that share no memory with the network."""
        return {
            name: value.detach().cpu().numpy().astype(np.float32, copy=True)
            for name, value in self.state_dict().items()
        }

    def load_arrays(self, tensors: Mapping[str, Floats], *, assign: bool = False) -> None:
        """Set every parameter: a copy, or the arrays' own memory with ``assign``.

        Raises:
            DecodeError: if names or shapes are not exactly this network's.
        """
        state = {name: torch.from_numpy(array) for name, array in tensors.items()}
        try:
            self.load_state_dict(state, assign=assign)
        except RuntimeError as exc:
            raise DecodeError(f"weights do not fit the side-network: {str(exc)[:300]}") from exc


def from_bundle(bundle: Bundle) -> SideNetwork:
    """Build the side-network that a bundle describes and set its weights.

    Nothing is allocated on the word of the description: the network takes the bundle's own tensors.

    Raises:
        DecodeError: if its tensors are not those that its description asks for.
    """
    with torch.device("meta"):
        about = bundle.about
        network = SideNetwork(about.side_network, labels=len(about.labels), seed=0, task=about.task)
        for name, width in sorted(bundle.about.aligns.items()):
            network.add_align(name, width)
        for name, counts in sorted(about.starts.items()):
            for taps in counts:
                network.add_start(name, taps)
    network.load_arrays(bundle.tensors, assign=True)
    return network.eval().requires_grad_(False)


def _dropout(values: Tensor, rate: float) -> Tensor:
    """Dropout to the nearest 256th, by a byte a value: drawing floats as torch does takes thrice as long."""
    kept = round(256 * (1 - rate))
    if kept == 256:
        return values
    drawn = torch.empty(-(-values.numel() // 8), dtype=torch.int64, device=values.device).random_(
        -(2**63), None
    )
    stays = drawn.view(torch.uint8)[: values.numel()].view(values.shape) < kept
    return values * stays * (256 / max(1, kept))
