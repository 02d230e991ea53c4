"""Which token has which row: a model's vocabulary, believed only after checking.

A vocabulary table (embedding, output head, its bias) has a row for each token id.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from resm_kernels.checkpoint.companions import tokenizer_paths
from resm_kernels.checkpoint.layout import Checkpoint, TensorInfo, read_json
from resm_kernels.errors import CheckpointError

TABLE_PARTS = (
    "embed", "lm_head", "wte", "shared_head.head", "cls.predictions", "vocab_projector"
)  # fmt: skip
"""Parts of names of tensors that may have a row for each token; their length decides."""
TABLE_ENDS = ("shared.weight", "output.weight")
"""Ends of such names."""
INPUTS = (
    "*embed_tokens.weight", "*wte.weight", "*shared.weight", "*word_embeddings.weight",
    "*tok_embeddings.weight", "*embed_in.weight",
)  # fmt: skip
"""Names of input embeddings, which count where no table is as long as the config says."""
MAX_TOKENS = 1 << 24
"""No token id reaches this."""
MAX_VALUES = 4_000_000
"""Most values in a tokenizer file: a quarter of a million tokens with half a million merges."""
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
TOKEN_LISTS = frozenset({"tokenizer.json", "vocab.json"})
"""Files that list a vocabulary, one of which a model must have."""
SETTINGS = "tokenizer_config.json"
SOURCES = (*sorted(TOKEN_LISTS), "added_tokens.json", SETTINGS)
"""Files that say which token has which id."""
DECODER = "added_tokens_decoder"
FIX = "save the tokenizer again: AutoTokenizer.from_pretrained(MODEL).save_pretrained(MODEL)"


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of one model.

    Attributes
    ----------
    reference : str
        What the user called the model.
    rows : int
        Rows of its tables. Tokens with an id from there on have none; rows without a token are
        padding.
    ids : mapping
        Token text to id, in the order of ids.
    added : mapping
        Text of the tokens that stand beside the tokenizer's model, to their flags.
    next_id : int or None
        The id that the `tokenizers` library gives the next added token; None where the ids leave
        gaps, since its versions differ there.
    """

    reference: str
    rows: int
    ids: Mapping[str, int]
    added: Mapping[str, Mapping[str, bool]]
    next_id: int | None

    def row(self, token: str) -> int:
        """The token's row, -1 where the model has none for it."""
        number = self.ids.get(token, -1)
        return number if number < self.rows else -1

    @property
    def tokens(self) -> Iterable[str]:
        """The tokens that have a row, in order."""
        return (token for token, number in self.ids.items() if number < self.rows)


def vocabulary_rows(checkpoint: Checkpoint) -> int | None:
    """Rows of a model's vocabulary tables: its config's `vocab_size` where a table has that
    length, else the length of its input embedding; None where it has no such table."""
    tables = [t for t in checkpoint.tensors.values() if len(t.shape) == 2 and is_table(t.name)]
    lengths = {t.shape[0] for t in tables}
    for config in text_configs(checkpoint.config):
        size = config.get("vocab_size")
        if type(size) is int and size in lengths:
            return size
    return next((t.shape[0] for t in tables if any(fnmatchcase(t.name, p) for p in INPUTS)), None)


def tables_of_config(checkpoint: Checkpoint) -> tuple[TensorInfo, ...]:
    """The matrices that have as many rows as the config says tokens: those it may tie."""
    sizes = [config.get("vocab_size") for config in text_configs(checkpoint.config)]
    tensors = checkpoint.tensors.values()
    return tuple(
        t for t in tensors if len(t.shape) == 2 and t.shape[0] in sizes and is_table(t.name)
    )


def is_table(name: str) -> bool:
    """Whether a name is that of an input or output embedding."""
    return name.endswith(TABLE_ENDS) or any(part in name for part in TABLE_PARTS)


def vocabulary_tables(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Names of the tensors that have a row for each token, biases of output heads included."""
    rows = vocabulary_rows(checkpoint)
    return tuple(
        t.name
        for t in checkpoint.tensors.values()
        if t.shape[:1] == (rows,)
        and is_table(t.name)
        and (len(t.shape) == 2 or (len(t.shape) == 1 and t.name.endswith("bias")))
    )


def text_configs(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The parts of a config that may tell the vocabulary's size, the closest first."""
    text = config.get("text_config")
    return [*([text] if isinstance(text, dict) else []), config]


def read_vocabulary(checkpoint: Checkpoint) -> Vocabulary:
    """Read a model's tokens and their ids from `tokenizer.json`, or from `vocab.json`.

    Ids are those that the `tokenizers` library gives: it numbers added tokens itself, whatever
    the file says, so that a file which says otherwise is refused.

    Raises
    ------
    CheckpointError
        Where there is no table or no readable tokenizer, or a file contradicts itself.
    """
    rows = vocabulary_rows(checkpoint)
    if rows is None:
        raise CheckpointError(
            f"{checkpoint.reference}: no vocabulary table",
            expected="an input embedding, named as in transformers",
            fix="leave tokenizer_source out",
        )
    return _read_files(checkpoint, rows)


def _read_files(checkpoint: Checkpoint, rows: int) -> Vocabulary:
    there = {path.name: path for path in tokenizer_paths(checkpoint)}
    if path := there.get("tokenizer.json"):
        content = _read_object(path)
        model = content.get("model")
        words = model.get("vocab") if isinstance(model, dict) else None
        builder = _Builder(words, path)
        builder.add_all(content.get("added_tokens") or [], path)
    elif path := there.get("vocab.json"):
        builder = _Builder(_read_object(path), path)
    else:
        raise CheckpointError(
            f"{checkpoint.folder}: no tokenizer whose tokens can be aligned",
            got=", ".join(there) or "no tokenizer files",
            expected="tokenizer.json, or vocab.json",
            fix=FIX if there else "put the model's tokenizer files into its folder",
        )
    if path := there.get(SETTINGS):
        decoder = _read_object(path).get(DECODER)
        if decoder:
            builder.add_all(_decoder_entries(decoder, path), path)
            return builder.build(checkpoint.reference, rows)
    if path := there.get("added_tokens.json"):
        entries = [{"content": text, "id": number} for text, number in _read_object(path).items()]
        builder.add_all(sorted(entries, key=lambda e: _sort_key(e["id"])), path)
    return builder.build(checkpoint.reference, rows)


def _read_object(path: Path) -> dict[str, Any]:
    content = read_json(path, MAX_VALUES)
    if not isinstance(content, dict):
        raise damaged(path, "not a JSON object", type(content).__name__)
    return content


def _decoder_entries(decoder: object, path: Path) -> list[dict[str, Any]]:
    if not isinstance(decoder, dict):
        raise damaged(path, f"{DECODER} must map ids to tokens", type(decoder).__name__)
    entries = []
    for key, entry in decoder.items():
        if not (key.isascii() and key.isdigit() and len(key) < 12 and isinstance(entry, dict)):
            raise damaged(path, f"{DECODER} must map ids to tokens", f"{_cut(key)}: {_cut(entry)}")
        entries.append({**entry, "id": int(key)})
    return sorted(entries, key=lambda e: int(e["id"]))


class _Builder:
    """Collects tokens, and refuses what contradicts the tokens before."""

    def __init__(self, words: object, path: Path) -> None:
        self.path = path
        if isinstance(words, list):
            pairs = (w for w in words if isinstance(w, list) and len(w) == 2)
            if sum(isinstance(w[0], str) for w in pairs) < len(words):
                raise damaged(path, "the vocabulary must list [token, score] pairs")
            self.ids = {word: number for number, (word, _) in enumerate(words)}
            if len(self.ids) < len(words):
                raise damaged(path, "a token stands twice in the vocabulary")
        elif isinstance(words, dict):
            for word, number in words.items():
                if not _is_id(number):
                    raise damaged(path, f"token {_cut(word)}: no id", _cut(number))
            self.ids = dict(words)
        else:
            raise damaged(path, "no vocabulary", type(words).__name__)
        self.texts = {number: word for word, number in self.ids.items()}
        if len(self.texts) < len(self.ids):
            word, number = next((w, n) for w, n in self.ids.items() if self.texts[n] != w)
            both = f"{_cut(self.texts[number])}, {_cut(word)}"
            raise damaged(path, f"id {number} stands for two tokens", both)
        self.added: dict[str, dict[str, bool]] = {}
        gaps = max(self.texts, default=-1) >= len(self.texts)
        self.next_id = None if gaps else len(self.texts)

    def add_all(self, entries: object, path: Path) -> None:
        """Take over added tokens, `{content, id, flags}` each, in the order of the file."""
        if not isinstance(entries, list):
            raise damaged(path, "the added tokens must be a list", type(entries).__name__)
        for entry in entries:
            self._add(entry, path)

    def _add(self, entry: object, path: Path) -> None:
        content = entry.get("content") if isinstance(entry, dict) else None
        if not isinstance(entry, dict) or not isinstance(content, str) or not content:
            raise damaged(path, "an added token without a text", _cut(entry))
        number = entry.get("id")
        if not _is_id(number):
            raise damaged(path, f"added token {_cut(content)}: no id", _cut(number))
        special = entry.get("special", False)
        flags = {name: entry.get(name, False) for name in FLAGS}
        flags["normalized"] = entry.get("normalized", not special)
        if not all(type(value) is bool for value in flags.values()):
            raise damaged(path, f"added token {_cut(content)}: its flags must be true or false")
        if content in self.added and self.ids[content] == number:
            return
        given = self.ids.get(content, self.next_id)
        if given is None:
            raise damaged(
                path, f"added token {_cut(content)}: the ids in the vocabulary leave gaps"
            )
        if number != given:
            raise CheckpointError(
                f"{path}: added token {_cut(content)} has another id than it gets when loaded",
                got=f"id {number}",
                expected=f"{given}: its id in the vocabulary, or the first after all others",
                fix=FIX,
            )
        if content not in self.ids:
            self.ids[content] = given
            self.next_id = given + 1
        self.added[content] = flags

    def build(self, reference: str, rows: int) -> Vocabulary:
        """The vocabulary, once every token is known."""
        try:
            "".join(self.ids).encode()
        except UnicodeEncodeError as error:
            raise damaged(self.path, "a token is no text: it holds a lone surrogate") from error
        ordered = dict(sorted(self.ids.items(), key=lambda item: item[1]))
        return Vocabulary(reference, rows, ordered, self.added, self.next_id)


def _is_id(value: object) -> bool:
    return type(value) is int and 0 <= value < MAX_TOKENS


def _sort_key(value: object) -> int:
    return value if type(value) is int else -1


def _cut(value: object) -> str:
    return repr(value)[:80]


def damaged(path: Path, what: str, got: str | None = None) -> CheckpointError:
    """The error for a file that is no tokenizer's."""
    return CheckpointError(
        f"{path}: {what}", got=got, fix="the file is damaged or not a tokenizer's: fetch it again"
    )
