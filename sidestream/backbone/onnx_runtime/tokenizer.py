"""A ``tokenizer.json`` that answers as a tokenizer of transformers, as far as backbones ask one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from sidestream.backbone.inputs import Text
from sidestream.backbone.onnx_runtime.folder import TokenizerFacts
from sidestream.contract.errors import BackboneError


class ExportedTokenizer:
    """Gives the tokens that the exported model's own tokenizer gives. Not for two threads at once.

    Args:
        path: ``tokenizer.json``.
        facts: What that does not say.

    Raises:
        BackboneError: the file cannot be read.
    """

    is_fast = True

    def __init__(self, path: Path, facts: TokenizerFacts) -> None:
        try:
            self._inner = Tokenizer.from_file(str(path))
        except Exception as exc:  # the library raises no narrower kind
            raise BackboneError(f"{path}: is no tokenizer that can be read: {exc}") from exc
        self._inner.no_padding()
        self._cut = facts.cut
        self.pad_token_id = facts.pad
        self.unk_token_id = facts.unknown
        self.all_special_ids = list(facts.special)

    def __len__(self) -> int:
        size: int = self._inner.get_vocab_size(with_added_tokens=True)
        return size

    def __call__(
        self,
        texts: str | Sequence[Text],
        *,
        add_special_tokens: bool = True,
        truncation: bool = False,
        max_length: int = 0,
        return_token_type_ids: bool = False,
        return_offsets_mapping: bool = False,
        **_: bool,
    ) -> Mapping[str, Any]:
        """Tokenise a text, or several texts and pairs, each by itself; the arguments are transformers'."""
        if truncation:
            self._inner.enable_truncation(max_length, strategy="longest_first", direction=self._cut)
        else:
            self._inner.no_truncation()
        rows = [texts] if isinstance(texts, str) else list(texts)
        encoded = self._inner.encode_batch(rows, add_special_tokens=add_special_tokens)
        found: dict[str, list[Any]] = {"input_ids": [row.ids for row in encoded]}
        if return_token_type_ids:
            found["token_type_ids"] = [row.type_ids for row in encoded]
        if return_offsets_mapping:
            found["offset_mapping"] = [row.offsets for row in encoded]
        return {key: rows[0] for key, rows in found.items()} if isinstance(texts, str) else found

    def get_vocab(self) -> Mapping[str, int]:
        """Every token's id."""
        vocabulary: Mapping[str, int] = self._inner.get_vocab(with_added_tokens=True)
        return vocabulary

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        """Their tokens, as the vocabulary has them."""
        return [self._inner.id_to_token(one) or "" for one in ids]

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """The text that they make."""
        decoder = self._inner.decoder
        text: str = " ".join(tokens) if decoder is None else decoder.decode(list(tokens))
        return text
