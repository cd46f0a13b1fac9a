"""A language model's samples as it takes them: token ids in, and for each the token that follows. Pure.

A text that is longer than the model may see at once is cut into windows, and every token of it but the first
is predicted in exactly one of them. Of a prompt with a completion only the completion's tokens are predicted,
each window that begins within the prompt showing as much of it as there is room for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from sidestream.contract.tasks import NO_TARGET


class Window(NamedTuple):
    """One piece of a sample that goes through the model."""

    inputs: list[int]
    """What it sees."""
    targets: list[int]
    """After each of these, the token that follows; :data:`NO_TARGET` where that is not to be predicted."""


def cut(prompt: Sequence[int], rest: Sequence[int], longest: int) -> list[Window]:
    """Cut a sample into windows of at most ``longest`` tokens.

    Args:
        prompt: Tokens that are given and not predicted; may be empty.
        rest: Tokens that are to be predicted, but for the very first of a sample without a prompt.
        longest: Tokens that the model may see at once, 2 or more.
    """
    ids = [*prompt, *rest]
    first = max(len(prompt), 1)  # the first token that is predicted
    kept = min(first, max(longest - (len(ids) - first) + 1, longest // 2))
    windows: list[Window] = []
    start, told = first - kept, first
    while told < len(ids):
        end = min(start + longest, len(ids) - 1)
        targets = [NO_TARGET] * (told - 1 - start) + ids[told : end + 1]
        windows.append(Window(ids[start:end], targets))
        start, told = end, end + 1
    return windows


def windows_of(
    tokenizer: Any, text: str, completion: str | None, longest: int, *, vocabulary: int, ends: Sequence[int]
) -> list[Window]:
    """A sample as a language model takes it: a plain text, or a prompt and the completion that ends it.

    Args:
        tokenizer: The model's.
        text: The text, or the prompt.
        completion: What is to follow it, if it is a prompt.
        longest: Tokens that the model may see at once, 2 or more.
        vocabulary: How many tokens it has; special ones beyond become its last one.
        ends: Tokens that end a text.
    """

    def within(tokens: Sequence[int]) -> list[int]:
        return [min(token, vocabulary - 1) for token in tokens]

    given = within(tokenizer(text, verbose=False)["input_ids"])
    if completion is None:
        return cut([], given, longest)
    answer = within(tokenizer(completion, add_special_tokens=False, verbose=False)["input_ids"])
    return cut(given, [*answer, *ends[:1]], longest)
