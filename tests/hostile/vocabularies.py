"""Tokenizers and `tokenizer_source`: files that lie about tokens, ids and rows."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.hostile.cases import Arrange, Case, Site, bad, good, recipe, sparse
from tests.hostile.files import CONFIG, weights, write_model

TABLE = "model.embed_tokens.weight"
TOKENIZER = "expert-a/tokenizer.json"
SETTINGS = "expert-a/tokenizer_config.json"
WORDS = {"a": 0, "b": 1, "c": 2}
UNION = "merge_method: resm\nbase_model: {base}\nmodels: [{model: {a}}, {model: {b}}]\n"
ORDERED = {"content": "d", "id": 3}

Changes = Mapping[str, Any]


def model(folder: Path, seed: int, rows: int, config: str = CONFIG) -> None:
    """A model with a table of so many rows."""
    table = weights(seed)["layers.0.weight"].repeat(8, 1)[:rows].contiguous()
    write_model(folder, {**weights(seed), TABLE: table})
    (folder / "config.json").write_text(config)


def tokenizer(words: object = WORDS, **more: Any) -> bytes:
    return json.dumps({"model": {"type": "BPE", "vocab": words}, **more}).encode()


def source(
    name: str = "union", expert: bytes | Callable[[Path], None] = b"", rows: int = 4, **files: str
) -> Arrange:
    """Three models with tokenizers; the first expert's is `expert`, its other files `files`."""

    def arrange(site: Site) -> Any:
        for seed, folder in enumerate(site.models):
            model(folder, seed, rows if folder == site.a else 4)
            (folder / "tokenizer.json").write_bytes(tokenizer())
        path = site.a / "tokenizer.json"
        if isinstance(expert, bytes):
            path.write_bytes(expert or tokenizer(added_tokens=[ORDERED]))
        else:
            path.unlink()
            expert(path)
        for stem, content in files.items():
            (site.a / f"{stem}.json").write_text(content)
        return recipe(f"{UNION}tokenizer_source: {json.dumps(name)}\n")(site)

    return arrange


def words(vocabulary: object, **more: Any) -> Arrange:
    return source(expert=tokenizer(vocabulary, **more))


def added(*entries: object) -> Arrange:
    return words(WORDS, added_tokens=list(entries))


def settings(**content: Any) -> Arrange:
    return source(tokenizer_config=json.dumps(content))


def unaligned(arrange: Arrange) -> Arrange:
    """The same without a tokenizer_source: the vocabularies are only compared."""

    def without(site: Site) -> Any:
        argv = arrange(site)
        path = site.root / "recipe.yml"
        path.write_text(path.read_text().partition("tokenizer_source")[0])
        return argv

    return without


def heavy(*names: str) -> Arrange:
    """Companion files of 200 MB each, which are holes, beside the first expert."""

    def arrange(site: Site) -> Any:
        argv = unaligned(source())(site)
        for name in names:
            sparse(site.a / name, 200 << 20)
        return argv

    return arrange


def without_tokenizers(site: Site) -> Any:
    argv = source(rows=5)(site)
    for folder in site.models:
        (folder / "tokenizer.json").unlink()
    return argv


def numbered(first: int, count: int) -> bytes:
    """A vocabulary of many words."""
    return tokenizer({f"w{i}": first + i for i in range(count)})


def config_of(vocab_size: object) -> Arrange:
    return source(config=json.dumps({"vocab_size": vocab_size}))


SURROGATE = b'{"model": {"vocab": {"a": 0, "\\ud800": 1}}}'
LONELY = b'{"content": "\\udfff", "id": 1}'
SURROGATE_ADDED = b'{"model": {"vocab": {"a": 0}}, "added_tokens": [%s]}' % LONELY
TWICE = b'{"model": {"vocab": {"a": 0, "a": 1}}}'
NAN = b'{"model": {"vocab": {"a": NaN}}}'
DEEP = b'{"model": ' * 100_000 + b"0" + b"}" * 100_000
NO_ID = "no id"

VOCABULARIES: list[Case] = [
    bad("300 MB", source(expert=lambda path: sparse(path, 300 << 20)), TOKENIZER, "too "),
    bad("200 MB", source(expert=lambda path: sparse(path, 200 << 20)),
        TOKENIZER, "too ", megabytes=512),
    bad("a folder", source(expert=Path.mkdir), TOKENIZER, "Is a directory"),
    bad("a FIFO", source(expert=os.mkfifo), TOKENIZER, "Not a regular file"),
    bad("a link to a device", source(expert=lambda path: path.symlink_to("/dev/zero")),
        TOKENIZER, "Not a regular file"),
    bad("a link to nothing", source(expert=lambda path: path.symlink_to("gone")),
        TOKENIZER, "No such file"),
    bad("no JSON", source(expert=b"{"), TOKENIZER, "invalid JSON"),
    bad("no UTF-8", source(expert=b'{"\xff": 1}'), TOKENIZER, "invalid JSON"),
    bad("nested 100,000 deep", source(expert=DEEP), TOKENIZER, "nested too deeply"),
    bad("not an object", source(expert=b"[]"), TOKENIZER, "not a JSON object"),
    bad("no model", source(expert=b"{}"), TOKENIZER, "no vocabulary"),
    bad("model is a list", source(expert=b'{"model": []}'), TOKENIZER, "no vocabulary"),
    bad("vocabulary is a text", words("abc"), TOKENIZER, "no vocabulary"),
    bad("vocabulary of texts", words(["a", "b"]), TOKENIZER, "[token, score] pairs"),
    bad("vocabulary of numbers", words([[1, 0.5]]), TOKENIZER, "[token, score] pairs"),
    bad("vocabulary with a text twice", words([["a", 0], ["a", 0]]), TOKENIZER, "stands twice"),
    bad("a key twice", source(expert=TWICE), TOKENIZER, "the key 'a' stands twice"),
    bad("an id below 0", words({"a": -1}), TOKENIZER, NO_ID, "-1"),
    bad("an id of 2**63", words({"a": 2**63}), TOKENIZER, NO_ID, "9223372036854775808"),
    bad("an id of 2**24", words({"a": 2**24}), TOKENIZER, NO_ID, "16777216"),
    bad("an id that is true", words({"a": True}), TOKENIZER, NO_ID, "True"),
    bad("an id that is 1.0", words({"a": 1.0}), TOKENIZER, NO_ID, "1.0"),
    bad("an id that is NaN", source(expert=NAN), TOKENIZER, "NaN is not JSON"),
    bad("an id that is a list", words({"a": []}), TOKENIZER, NO_ID),
    bad("an id twice", words({"a": 0, "b": 0}), TOKENIZER, "id 0 stands for two tokens"),
    bad("a lone surrogate", source(expert=SURROGATE), TOKENIZER),
    bad("a lone surrogate, added", source(expert=SURROGATE_ADDED), TOKENIZER, "lone surrogate"),
    bad("a token of 100,000 letters", words({"x" * 100_000: -1}), TOKENIZER, "xxx"),
    bad("escapes in a token", words({"\x1b[2J": -1}), TOKENIZER, NO_ID),
    bad("added tokens that are none", words(WORDS, added_tokens={"a": 1}), TOKENIZER, "a list"),
    bad("an added token that is a text", added("d"), TOKENIZER, "without a text"),
    bad("an added token without a text", added({"id": 3}), TOKENIZER, "without a text"),
    bad("an empty added token", added({"content": "", "id": 3}), TOKENIZER, "without a text"),
    bad("an added token without an id", added({"content": "d"}), TOKENIZER, NO_ID),
    bad("an added token far away", added({"content": "d", "id": 9}), TOKENIZER, "another id"),
    bad("an added token on another's id", added({"content": "d", "id": 0}), TOKENIZER,
        "another id"),
    bad("flags that are numbers", added({**ORDERED, "special": 1}), TOKENIZER, "true or false"),
    bad("a million ids with gaps, and one more",
        words({f"w{i}": 9 * i for i in range(100_000)}, added_tokens=[ORDERED]),
        TOKENIZER, "leave gaps", megabytes=256),
    bad("decoder is a list", settings(added_tokens_decoder=["d"]), SETTINGS, "must map ids"),
    bad("decoder with odd ids", settings(added_tokens_decoder={"\u0663": {"content": "d"}}),
        SETTINGS, "must map ids"),
    bad("decoder with an id of 20 digits",
        settings(added_tokens_decoder={"3" * 20: {"content": "d"}}),
        SETTINGS, "must map ids"),
    bad("settings that are no object", source(tokenizer_config="[]"), SETTINGS,
        "not a JSON object"),
    bad("settings over 64 MB",
        lambda site: (source()(site), sparse(site.a / "tokenizer_config.json", 65 << 20))[0],
        SETTINGS, "too long for a JSON file", megabytes=256),
    bad("added_tokens.json of texts", source(added_tokens='{"d": "3"}'), "a/added_tokens.json",
        NO_ID),
    bad("no tokenizer, other rows", without_tokenizers, "in/base", "no tokenizer files"),
    bad("other rows, no source", unaligned(source(rows=5)), "vocabularies do not fit together",
        "expert-a", "5 rows, base 4", "tokenizer_source"),
    bad("tokens moved, no source", unaligned(words({"b": 0, "a": 1, "c": 2})),
        "vocabularies do not fit together", "2 tokens in other rows"),
    bad("a model that is not there", source("./in/gone"), "in/gone", "no such file or folder"),
    bad("a model with a NUL", source("a\0b"), "recipe.yml", "tokenizer_source", code=2),
    bad("a source of 300,000 letters", source("x" * 300_000), "no such file or folder"),
    bad("a source of plus signs", source("+" * 300_000), "no such file or folder"),
    bad("a source that is a tokenizer", source("in/base/tokenizer.json"), "in/base/tokenizer.json"),
    bad("a source without weights",
        lambda site: (source("in/donor")(site), (site.root / "in" / "donor").mkdir())[0],
        "in/donor", "no weights"),
    good("one more token", source(rows=5)),
    good("one more token without a row", source()),
    good("a vocabulary without rows", source("in/expert-a", tokenizer({"a": 5, "b": 7}))),
    good("another's vocabulary", source("in/expert-a", rows=5)),
    good("the base's, damaged settings elsewhere", unaligned(source(tokenizer_config="{"))),
    good("a token that is an escape", words({**WORDS, "\x1b]0;owned\x07": 3})),
    good("100,000 tokens for 4 rows", source(expert=numbered(0, 100_000))),
    good("a config that says 10**12 rows", config_of(10**12)),
    good("a config that says -1 rows", config_of(-1)),
    good("a config that says a list of rows", config_of([4])),
    good("a config that says 3 rows of 4", config_of(3)),
    good("heavy files beside an expert", heavy("merges.txt", "tokenizer.model", "vocab.txt")),
]  # fmt: skip
