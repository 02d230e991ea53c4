"""Vocabularies that differ between models: rows of one number do not belong together.

`align` decides the output's vocabulary, as mergekit's `tokenizer_source` means it, and finds
every token's row in every model; `align_tables` brings the tables into that order;
`output_files` makes the tokenizer and the configs say the same.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from resm_kernels.checkpoint.companions import (
    is_tokenizer_file,
    tokenizer_files,
    tokenizer_paths,
)
from resm_kernels.checkpoint.files import PIECE, canonical_json
from resm_kernels.checkpoint.layout import Checkpoint, parse_json
from resm_kernels.checkpoint.tokens import (
    DECODER,
    FLAGS,
    MAX_VALUES,
    SETTINGS,
    SOURCES,
    TOKEN_LISTS,
    Vocabulary,
    damaged,
    read_vocabulary,
    text_configs,
    vocabulary_rows,
    vocabulary_tables,
)
from resm_kernels.errors import CheckpointError, PlanError


@dataclass(frozen=True)
class NewToken:
    """A token that the output's tokenizer has and the base's has not, or not as an added one."""

    text: str
    id: int
    flags: Mapping[str, bool]


@dataclass(frozen=True)
class Donor:
    """The model whose tokenizer the output takes over: its tokenizer files and its config."""

    files: Mapping[str, bytes]
    config: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Alignment:
    """Where the rows of the output's tables come from.

    Attributes
    ----------
    source : str
        `base`, `union`, or what the user called the model whose vocabulary it is.
    rows : int
        Rows of every aligned table, the output's `vocab_size`.
    indices : tuple of Tensor
        For the base, then for every expert: int64 [rows], the row of that model's table, -1
        where it has none.
    prefer_base : bool
        Whether a row that a model lacks is the base's where the base has it, and not the mean.
    base : Vocabulary
        The base's tokens.
    base_files : str
        Digest of the files they were read from.
    out_ids : mapping
        The output's tokens that have a row, and their ids.
    new_tokens : tuple of NewToken
        What the base's tokenizer files lack.
    donor : Donor or None
        The other model whose vocabulary it is.
    notes : tuple of str
        What the user should know.
    """

    source: str
    rows: int
    indices: tuple[torch.Tensor, ...]
    prefer_base: bool
    base: Vocabulary = field(repr=False)
    base_files: str
    out_ids: Mapping[str, int] = field(repr=False)
    new_tokens: tuple[NewToken, ...] = ()
    donor: Donor | None = None
    notes: tuple[str, ...] = ()

    def keeps(self, model: int) -> bool:
        """Whether a model's tables (0 is the base) stay as they are."""
        index = self.indices[model]
        return torch.equal(index, torch.arange(len(index)))

    @property
    def changes_nothing(self) -> bool:
        """Whether every table of every model stays as it is."""
        return all(map(self.keeps, range(len(self.indices))))

    @property
    def digest(self) -> str:
        """SHA-256 of all that decides about the output: for the plan's identity."""
        new = [[t.text, t.id, dict(t.flags)] for t in self.new_tokens]
        donor = {} if self.donor is None else self.donor.files
        files = {name: hashlib.sha256(data).hexdigest() for name, data in donor.items()}
        head = [self.source, self.rows, self.prefer_base, self.base_files, new, files]
        found = hashlib.sha256(canonical_json(head))
        for index in self.indices:
            found.update(index.numpy().tobytes())
        return found.hexdigest()


def align(
    source: Literal["base", "union"] | Checkpoint,
    base: Checkpoint,
    experts: Sequence[Checkpoint],
    *,
    prefer_base: bool = True,
) -> Alignment:
    """Decide the output's vocabulary and find each of its tokens in each model.

    Parameters
    ----------
    source : {"base", "union"} or Checkpoint
        Whose tokens the output has. `union`: the base's tokens under their ids, then what the
        experts have besides: first, expert by expert in order of ids, their ordinary tokens,
        then likewise their added ones, each at the next free id. Tokens without a row in their
        model do not count. mergekit's rule, whose own order of experts is not fixed.
    base, experts : Checkpoint
        A model without any tokenizer files and with as many rows as the base has the base's.
    prefer_base : bool
        Whether a row that a model lacks is the base's where the base has it. False where the
        base only gives the layout (`linear` without `base_model`): then the mean comes first.

    Notes
    -----
    Rows without a token (padding) belong together by number. The output has the rows of the
    vocabulary's owner (the base's for `union`), more only where tokens need them.

    Raises
    ------
    CheckpointError
        Where a model's tokens cannot be read.
    PlanError
        Where the tables cannot be brought together.
    """
    notes: list[str] = []
    vocabularies = _read_all([base, *experts], notes)
    first = vocabularies[0]
    donor: Donor | None = None
    new: tuple[NewToken, ...] = ()
    rows = first.rows
    out = {token: number for token, number in first.ids.items() if number < rows}
    label = source if isinstance(source, str) else source.reference
    if isinstance(source, Checkpoint) and source.folder != base.folder:
        donor, owner = Donor(tokenizer_files(source), source.config), read_vocabulary(source)
        out, rows = {token: owner.ids[token] for token in owner.tokens}, owner.rows
    elif source == "union":
        new, grows = _union(vocabularies, notes)
        if grows:
            out = {**first.ids, **{t.text: t.id for t in new}}
            rows = max(rows, 1 + max(out.values()))
    indices = tuple(_index(out, rows, vocabulary) for vocabulary in vocabularies)
    found = Alignment(
        label, rows, indices, prefer_base, first, _fingerprint(tokenizer_files(base, SOURCES)),
        out, new, donor, tuple(notes),
    )  # fmt: skip
    return found if found.changes_nothing else _checked(found, [base, *experts])


def _checked(alignment: Alignment, checkpoints: Sequence[Checkpoint]) -> Alignment:
    """Refuse or note what has a row for each token and is not brought into the new order."""
    notes = list(alignment.notes)
    for checkpoint in checkpoints:
        if any(
            "vocab_size_per_layer_input" in config for config in text_configs(checkpoint.config)
        ):
            raise PlanError(
                f"{checkpoint.reference}: its embeddings per layer have a vocabulary of their own",
                got=f"tokenizer_source: {alignment.source}, and vocabularies that differ",
                fix="leave tokenizer_source out, and merge models of one vocabulary",
            )
        rows, known = vocabulary_rows(checkpoint), vocabulary_tables(checkpoint)
        tensors = checkpoint.tensors.values()
        others = [t.name for t in tensors if t.shape[:1] == (rows,) and t.name not in known]
        if others:
            notes.append(
                f"{checkpoint.reference}: as long as the vocabulary, but not named like its "
                f"tables, and left as they are: {_list(others)}"
            )
    return replace(alignment, notes=tuple(notes))


def _read_all(checkpoints: Sequence[Checkpoint], notes: list[str]) -> list[Vocabulary]:
    """Every model's vocabulary; equal files are parsed once."""
    parsed: dict[tuple[str, int | None], Vocabulary] = {}
    found: list[Vocabulary] = []
    for checkpoint in checkpoints:
        rows = vocabulary_rows(checkpoint)
        key = _fingerprint(tokenizer_files(checkpoint, SOURCES)), rows
        if found and not tokenizer_paths(checkpoint) and rows == found[0].rows:
            notes.append(f"{checkpoint.reference}: no tokenizer files; taken to be the base's")
            parsed[key] = found[0]
        elif key not in parsed:
            parsed[key] = read_vocabulary(checkpoint)
        found.append(replace(parsed[key], reference=checkpoint.reference))
    return found


def _fingerprint(files: Mapping[str, bytes]) -> str:
    """SHA-256 of what numbers the tokens: of settings, the added tokens only."""
    parts = {name: files[name] for name in SOURCES if name in files}
    if SETTINGS in files:
        # A damaged file counts as it is: reading the vocabulary says what is wrong with it.
        with suppress(CheckpointError):
            settings = _parse(files[SETTINGS], Path(SETTINGS))
            parts[SETTINGS] = canonical_json(settings.get(DECODER))
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in parts.items()}
    return hashlib.sha256(canonical_json(digests)).hexdigest()


def _union(
    vocabularies: Sequence[Vocabulary], notes: list[str]
) -> tuple[tuple[NewToken, ...], bool]:
    """What the base's tokenizer lacks, and whether any token needs a row that the base lacks."""
    base, *experts = vocabularies
    plain: dict[str, Mapping[str, bool]] = {}
    added: dict[str, Mapping[str, bool]] = {}
    for expert in experts:
        for token in expert.tokens:
            if token in base.added:
                continue
            if token in expert.added:
                added.setdefault(token, expert.added[token])
            elif token not in base.ids:
                plain.setdefault(token, {**dict.fromkeys(FLAGS, False), "normalized": True})
    plain = {token: flags for token, flags in plain.items() if token not in added}
    if plain:
        notes.append(
            f"{len(plain):,} ordinary tokens of experts become added tokens ({_list(plain)}): "
            "the output's tokenizer takes them out of a text before it splits the rest"
        )
    new = []
    next_id = base.next_id
    for token, flags in {**plain, **added}.items():
        number = base.ids.get(token, next_id)
        if number is None:
            raise PlanError(
                f"{base.reference}: its token ids leave gaps, so that no token can be appended",
                fix="set tokenizer_source to base, or to one of the models",
            )
        new.append(NewToken(token, number, flags))
        if token not in base.ids:
            next_id = number + 1
    grows = any(base.row(token) < 0 for expert in experts for token in expert.tokens)
    return tuple(new), grows


def _index(out: Mapping[str, int], rows: int, vocabulary: Vocabulary) -> torch.Tensor:
    index = torch.full((rows,), -1, dtype=torch.int64)
    free = torch.zeros(rows, dtype=torch.bool)
    free[: vocabulary.rows] = True
    taken = [vocabulary.ids[token] for token in vocabulary.tokens]
    free[[number for number in taken if number < rows]] = False
    free[list(out.values())] = False
    index[free] = torch.arange(rows)[free]
    known = [vocabulary.row(token) for token in out]
    index[list(out.values())] = torch.tensor(known, dtype=torch.int64)
    return index


def align_tables(tables: Sequence[torch.Tensor], alignment: Alignment) -> list[torch.Tensor]:
    """Bring one table of every model into the output's order of rows.

    A row that a model lacks is the base's where the base has the token, else the mean over the
    models that have it, else zero: a token that only the base knows, or the base does not know
    and one expert does, has a zero delta in the others.

    Parameters
    ----------
    tables : sequence of Tensor
        The base's, then every expert's: [rows of that model, ...], alike but for their rows.

    Returns
    -------
    list of Tensor
        [alignment.rows, ...], each in the dtype and on the device of its input; the input
        itself where its rows stay as they are. A mean is summed in float32 (float64 where a
        table is float64), in the order of the models, and rounded once to the table's dtype.

    Raises
    ------
    PlanError
        Where the tables do not fit the alignment.
    """
    shapes = [tuple(table.shape) for table in tables]
    if len(tables) != len(alignment.indices) or len({shape[1:] for shape in shapes}) > 1:
        raise PlanError(
            "the vocabulary tables do not fit together",
            got=", ".join(map(str, shapes)),
            expected=f"{len(alignment.indices)} tables that differ in their rows only",
        )
    for shape, index in zip(shapes, alignment.indices, strict=True):
        if len(index) and int(index.max()) >= shape[0]:
            raise PlanError(
                "a vocabulary table is too short",
                got=f"{shape[0]:,} rows",
                expected=f"at least {int(index.max()) + 1:,}",
            )
    return [
        table
        if len(table) == alignment.rows and alignment.keeps(model)
        else _aligned(tables, alignment, model)
        for model, table in enumerate(tables)
    ]


def _aligned(tables: Sequence[torch.Tensor], alignment: Alignment, model: int) -> torch.Tensor:
    table, index = tables[model], alignment.indices[model].to(tables[model].device)
    out = table.new_empty((alignment.rows, *table.shape[1:]))
    if len(table):
        torch.index_select(table, 0, index.clamp(min=0), out=out)
    missing = (alignment.indices[model] < 0).nonzero()[:, 0]
    size = max(1, PIECE // (8 * max(1, out[:1].numel())))
    for start in range(0, len(missing), size):
        rows = missing[start : start + size]
        out[rows.to(out.device)] = _filled(tables, alignment, rows).to(out)
    return out


def _filled(
    tables: Sequence[torch.Tensor], alignment: Alignment, rows: torch.Tensor
) -> torch.Tensor:
    """What some rows of the output are for the models that lack them."""
    wide = torch.float64 if any(t.dtype == torch.float64 for t in tables) else torch.float32
    total = tables[0].new_zeros((len(rows), *tables[0].shape[1:]), dtype=wide)
    count = torch.zeros(len(rows), dtype=torch.int64)

    def take(model: int, which: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        source = alignment.indices[model][rows[which]].to(tables[model].device)
        return which.to(total.device), tables[model][source].to(total)

    for model in range(1, len(tables)):
        which = (alignment.indices[model][rows] >= 0).nonzero()[:, 0]
        where, values = take(model, which)
        total[where] += values
        count[which] += 1
    total /= count.clamp(min=1).to(total.device).reshape(-1, *[1] * (total.dim() - 1))
    in_base = alignment.indices[0][rows] >= 0
    which = (in_base if alignment.prefer_base else in_base & (count == 0)).nonzero()[:, 0]
    where, values = take(0, which)
    total[where] = values
    return total


def output_files(files: Mapping[str, bytes], alignment: Alignment) -> dict[str, bytes]:
    """Make the base's companion files those of the output.

    Parameters
    ----------
    files : mapping
        As `companion_files` gives them for the base.

    Returns
    -------
    dict
        The same bytes where nothing changes. Else: new tokens in `tokenizer.json`,
        `tokenizer_config.json` and `added_tokens.json`; another model's tokenizer files in place
        of the base's, and the ids in configs those of the same tokens; the new `vocab_size`.
    """
    if _fingerprint(files) != alignment.base_files:
        raise CheckpointError(
            f"{alignment.base.reference}: the tokenizer changed after the merge was planned",
            fix="restore its files, or start the merge anew",
        )
    folder = Path(alignment.base.reference)
    result = dict(files)

    def change(name: str, edit: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        content = _parse(result.get(name, b"{}"), folder / name)
        changed = edit(content)
        if changed != content:
            result[name] = _dump(changed, folder / name)

    new, donor = alignment.new_tokens, alignment.donor
    if donor is not None:
        result = {name: data for name, data in files.items() if not is_tokenizer_file(name)}
        result |= donor.files
        for name in {"config.json", "generation_config.json"} & files.keys():
            change(name, lambda content: _with_ids(content, alignment, donor.config))
    elif new:
        fast = "tokenizer.json" in files
        if fast:
            change("tokenizer.json", lambda content: _with_entries(content, new))
        if not fast or DECODER in _parse(files.get(SETTINGS, b"{}"), folder / SETTINGS):
            change(SETTINGS, lambda content: _with_decoder(content, new))
        if not fast or "added_tokens.json" in files:
            change("added_tokens.json", lambda content: content | {t.text: t.id for t in new})
    if alignment.rows != alignment.base.rows and "config.json" in files:
        change("config.json", lambda content: _with_size(content, alignment.rows))
    return result


def _with_entries(content: dict[str, Any], new: Sequence[NewToken]) -> dict[str, Any]:
    """tokenizer.json with more added tokens."""
    entries = [{"id": t.id, "content": t.text, **t.flags} for t in new]
    added = [*(content.get("added_tokens") or []), *entries]
    return {**content, "added_tokens": sorted(added, key=lambda entry: int(entry["id"]))}


def _with_decoder(content: dict[str, Any], new: Sequence[NewToken]) -> dict[str, Any]:
    """tokenizer_config.json with more added tokens."""
    more = {str(t.id): {"content": t.text, **t.flags} for t in new}
    return {**content, DECODER: {**(content.get(DECODER) or {}), **more}}


def _with_size(config: Mapping[str, Any], rows: int) -> dict[str, Any]:
    changed = dict(config)
    if "vocab_size" in config or not isinstance(config.get("text_config"), dict):
        changed["vocab_size"] = rows
    if isinstance(config.get("text_config"), dict):
        changed["text_config"] = {**config["text_config"], "vocab_size": rows}
    return changed


def _with_ids(
    config: Mapping[str, Any], alignment: Alignment, donor: Mapping[str, Any]
) -> dict[str, Any]:
    """Ids of the same tokens; a token that is gone gives way to the donor's under that key."""
    out = alignment.out_ids
    moved = {n: out[text] for text, n in alignment.base.ids.items() if text in out}

    def renumber(value: object, instead: object) -> object:
        if isinstance(value, list):
            return [moved[v] for v in value if v in moved] or instead
        return moved.get(value, instead) if type(value) is int else value

    changed = dict(config)
    for key, value in config.items():
        if isinstance(value, dict) and key == "text_config":
            theirs = donor.get(key)
            theirs = theirs if isinstance(theirs, dict) else donor
            changed[key] = _with_ids(value, alignment, theirs)
        elif key.endswith(("_token_id", "_token_index")):
            changed[key] = renumber(value, donor.get(key))
    return changed


def _parse(raw: bytes, path: Path) -> dict[str, Any]:
    content = parse_json(raw, path, MAX_VALUES)
    if not isinstance(content, dict):
        raise damaged(path, "not a JSON object", type(content).__name__)
    return content


def _dump(content: Mapping[str, Any], path: Path) -> bytes:
    try:
        return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError as error:
        raise damaged(path, "a lone surrogate is no text") from error


@dataclass(frozen=True)
class Difference:
    """How an expert's vocabulary differs from the base's; `str()` says it in one sentence.

    Attributes
    ----------
    more, fewer : tuple of str
        Tokens with a row in the expert and not in the base, and the other way round.
    moved : tuple of str
        Tokens that both know, in different rows.
    unread : str or None
        Why the tokens could not be compared.
    """

    reference: str
    rows: int
    base_rows: int
    more: tuple[str, ...] = ()
    fewer: tuple[str, ...] = ()
    moved: tuple[str, ...] = ()
    unread: str | None = None

    @property
    def blocks(self) -> bool:
        """Whether rows of one number cannot be merged: tables of other lengths, or tokens moved."""
        return self.rows != self.base_rows or bool(self.moved)

    def __str__(self) -> str:
        parts = [
            f"{len(tokens):,} {'token' if len(tokens) == 1 else 'tokens'} {what} ({_list(tokens)})"
            for tokens, what in (
                (self.more, "more"),
                (self.fewer, "fewer"),
                (self.moved, "in other rows"),
            )
            if tokens
        ]
        if self.unread is not None:
            parts.append(f"tokens not compared: {self.unread}")
        if self.rows == self.base_rows:
            head = f"{self.reference}: {self.rows:,} rows, as the base"
        else:
            head = f"{self.reference}: {self.rows:,} rows, base {self.base_rows:,}"
        text = f"{head}: {', '.join(parts) or 'the same tokens'}"
        return f"{text}; set tokenizer_source: union or base" if self.blocks else text


def differences(base: Checkpoint, experts: Sequence[Checkpoint]) -> list[Difference]:
    """What a merge without `tokenizer_source` must know: experts with another vocabulary.

    Tokenizer files are parsed only where they are not the same bytes as the base's; one that is
    missing says nothing.
    """
    base_rows, base_files = vocabulary_rows(base), tokenizer_files(base, SOURCES)
    known: list[Vocabulary] = []
    found = []
    for expert in experts:
        rows = vocabulary_rows(expert)
        if base_rows is None or rows is None:
            continue
        difference = Difference(expert.reference, rows, base_rows)
        try:
            files = tokenizer_files(expert, SOURCES)
            readable = TOKEN_LISTS & files.keys() and TOKEN_LISTS & base_files.keys()
            same = rows == base_rows and _fingerprint(files) == _fingerprint(base_files)
            if readable and not same:
                known = known or [read_vocabulary(base)]
                difference = _difference(known[0], read_vocabulary(expert))
        except CheckpointError as error:
            difference = replace(difference, unread=error.what)
        if difference != Difference(expert.reference, base_rows, base_rows):
            found.append(difference)
    return found


def _difference(base: Vocabulary, expert: Vocabulary) -> Difference:
    return Difference(
        expert.reference,
        expert.rows,
        base.rows,
        more=tuple(t for t in expert.tokens if base.row(t) < 0),
        fewer=tuple(t for t in base.tokens if expert.row(t) < 0),
        moved=tuple(t for t in expert.tokens if base.row(t) not in (-1, expert.ids[t])),
    )


def _list(texts: Iterable[str], most: int = 3) -> str:
    first = list(itertools.islice(texts, most + 1))
    return ", ".join(
        [*(repr(t)[1:-1][:40] for t in first[:most]), *(["..."] if len(first) > most else [])]
    )
