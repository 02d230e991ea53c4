"""Bad input at the command line: one clear message, the right exit status, nothing left behind."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

import resm_kernels
from resm_kernels.checkpoint.files import canonical_json, seal
from resm_kernels.cli import main
from resm_kernels.engine import executor
from resm_kernels.engine.plan import MergePlan
from resm_kernels.errors import UsageError
from resm_kernels.report.progress import BarProgress, LogProgress
from tests.hostile import cases as hostile
from tests.hostile.cases import (
    BOMB,
    L0,
    L1,
    NORM,
    RECIPE,
    A,
    Arrange,
    Case,
    bad,
    binary,
    everywhere,
    full,
    model_argument,
    nothing,
    raw,
    recipe,
    tensors,
    text,
)
from tests.hostile.files import CONFIG, entry, safetensors, snapshot, torch_bytes, write_model

pytestmark = pytest.mark.timeout(20)

SHARDED = ("--shard-size", "300")
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


class Site(hostile.Site):
    """The corpus' site, with hooks for what files alone cannot do."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(root)
        self.monkeypatch = monkeypatch

    def leave_unfinished(self) -> None:
        """Interrupt a merge after its last shard: `merged.partial` holds two finished shards."""
        with self.monkeypatch.context() as patch:
            patch.setattr(executor, "_check_inputs_unchanged", _interrupt)
            assert status(self.argv(*SHARDED)) == 130
        assert {p.name for p in self.partial.iterdir()} == {*SHARDS, "resm_journal.jsonl"}


def rows(**tables: Sequence[Case]) -> pytest.MarkDecorator:
    """Parametrise a test over the rows of some tables."""
    found = [pytest.param(c, id=f"{area}: {c.name}") for area, t in tables.items() for c in t]
    return pytest.mark.parametrize("case", found)


def status(argv: Sequence[object]) -> int | str | None:
    """Exit status of the command, run in this process."""
    try:
        return main([str(a) for a in argv])
    except SystemExit as stop:
        return stop.code


def assert_message(err: str, words: Sequence[str]) -> None:
    """The message says all of it, to a person and not to a terminal."""
    assert [word for word in words if word not in err] == [], err
    assert "Traceback" not in err
    assert "\x1b" not in err
    assert "\x07" not in err


@pytest.fixture
def site(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Site:
    """Its path holds no word of the test's name, which a message must not be matched by."""
    root = tmp_path_factory.mktemp("site")
    monkeypatch.chdir(root)
    return Site(root, monkeypatch)


def _interrupt(plan: MergePlan) -> None:
    raise KeyboardInterrupt


def test_paths_may_stand_on_both_sides_of_an_option(site: Site) -> None:
    command, file, out = recipe(RECIPE)(site) or ()
    assert status([command, file, "--quiet", out]) == 0
    assert (site.out / "resm_manifest.json").is_file()


def test_a_closed_stdout_is_no_failure(site: Site) -> None:
    site.monkeypatch.setattr(sys, "stdout", None)
    assert status(recipe(RECIPE)(site) or ()) == 0
    sys.stdout.close()
    assert (site.out / "resm_manifest.json").is_file()


def test_nothing_is_cut_in_a_pipe(
    site: Site, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    _, file, _ = recipe(RECIPE)(site) or ()
    out = site.root / ("long" * 40)
    assert status(["sweep", file, out, "--lambda", "0.5,0.8", "--quiet"]) == 0
    printed = capsys.readouterr().out
    assert f"{out}/lambda-0.5" in printed
    assert "…" not in printed


@pytest.mark.parametrize("progress", [True, "bar", object()])
def test_progress_that_cannot_be_told_is_refused(site: Site, progress: Any) -> None:
    with pytest.raises(UsageError, match=r"progress: got .*\n.*start, advance and stop"):
        resm_kernels.merge(site.base, [site.a], site.root / "out", progress=progress)
    assert not (site.root / "out.partial").exists()


# Commands


def command(*argv: str) -> Arrange:
    return lambda site: argv


def wrong(name: str, options: str, *words: str) -> Case:
    """A good merge with wrong options, which hold no spaces."""
    return bad(name, nothing, *words, code=2, options=options.split())


def no_cuda(site: Site) -> None:
    site.monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


def recipe_and_base(site: Site) -> list[object]:
    argv = recipe(RECIPE)(site) or ()
    return [*argv, "--base", site.base, "--param", "sigma=1"]


COMMANDS = [
    bad("nothing", command(), "usage: resm", "COMMAND", code=2),
    bad("unknown command", command("mrge"), "invalid choice: 'mrge'", code=2),
    bad("merge of nothing", command("merge"), "RECIPE.yml OUT", "no output folder", code=2),
    bad("three paths", command("merge", "a", "b", "c"), "RECIPE.yml OUT", "a b c", code=2),
    bad("three paths apart", command("merge", "a", "--quiet", "b", "c"), "a b c", code=2),
    bad("no base", command("merge", "--expert", "x", "out"), "--base, --expert and OUT", code=2),
    bad("no expert", command("merge", "--base", "x", "out"), "--base, --expert and OUT", code=2),
    bad("recipe and --base", recipe_and_base, "--base, --param beside a recipe", code=2),
    bad("missing recipe", command("merge", "none.yml", "out"), "none.yml", "No such file", code=2),
    bad("recipe is a folder", command("merge", "in", "out"), "in: ", "Is a directory", code=2),
    bad("no CUDA", no_cuda, "cuda is not there", "0 CUDA devices", "--device cpu",
        code=2, options=("--device", "cuda")),
    wrong("unknown device", "--device tpu", "device: got 'tpu'", "cuda:N or cuda:N,cuda:M"),
    wrong("negative device", "--device cuda:-1", "device: got 'cuda:-1'"),
    wrong("unknown option", "--lambada 1", "unrecognized arguments: --lambada"),
    wrong("unknown method", "--method resn", "merge_method: got 'resn'", "did you mean 'resm'?"),
    wrong("one weight for two", "--weight 1", "one weight per expert", "1 weights for 2 experts"),
    wrong("weight is a text", "--weight heavy", "--weight", "invalid float value: 'heavy'"),
    wrong("weight is NaN", "--weight nan --weight 1", "models[0].parameters.weight: got nan"),
    wrong("lambda is infinite", "--lambda inf", "lambda: got inf", "expected a number"),
    wrong("param without value", "--param sigma", "--param: got 'sigma'", "NAME=VALUE"),
    wrong("unknown param", "--param sigm=3", "sigm: unknown key", "did you mean 'sigma'?"),
    wrong("param is no YAML", "--param sigma=[", "--param sigma: not a value: '['"),
    wrong("param out of range", "--param sigma=-1", "parameters.sigma: got -1", ">= 0"),
    wrong("param of 400 digits", f"--param sigma=1{'0' * 400}", "sigma: got 1000", "a number"),
    wrong("param of 5000 digits", f"--param sigma=1{'0' * 5000}", "--param sigma"),
    wrong("param impossible date", "--param sigma=2020-99-99", "--param sigma", "2020-99-99"),
    wrong("param deep", f"--param sigma={'[' * 3000}", "--param sigma"),
    bad("param with a tag", nothing, "--param sigma", code=2,
        options=("--param", "sigma=!!bool maybe")),
    bad("param with code", nothing, "--param sigma: not a value", "object/apply:os.mkdir", code=2,
        options=("--param", "sigma=!!python/object/apply:os.mkdir [code-ran]")),
    wrong("out-dtype", "--out-dtype int8", "out_dtype: got 'int8'", "bfloat16"),
    wrong("memory budget", "--memory-budget lots", "got size 'lots'", "5GB or 512MiB"),
    wrong("negative budget", "--memory-budget=-1GB", "got size '-1GB'"),
    wrong("endless budget", f"--memory-budget {'9' * 400}", "got size '999"),
    wrong("shard size 0", "--shard-size 0", "got size '0'"),
    wrong("no workers", "--workers 0", "workers: got 0", "whole number"),
    wrong("no threads", "--threads 0", "threads: got 0", "whole number"),
    wrong("threads is a text", "--threads many", "--threads", "invalid int value: 'many'"),
    wrong("a hundred billion threads", "--threads 99999999999", "threads: got 99999999999"),
    wrong("nonfinite", "--nonfinite maybe", "--nonfinite", "invalid choice: 'maybe'"),
]  # fmt: skip


# Outputs


def output(place: str, make: Callable[[Path], object] | None = None, *options: str) -> Arrange:
    """Merge to a place in the site, where something may already be."""

    def arrange(site: Site) -> list[str]:
        path = site.root / place
        if make is not None:
            make(path)
        return site.argv(*options, out=path)

    return arrange


def occupied(path: Path) -> None:
    path.mkdir()
    (path / "keep.txt").write_text("precious")


def link_to_expert(path: Path) -> None:
    path.parent.symlink_to(path.parents[1] / "in" / "expert-a")


def file_as_parent(path: Path) -> None:
    path.parent.touch()


def read_only_parent(site: Site) -> None:
    parent = site.out.parent
    parent.chmod(0o555)
    if os.geteuid() == 0:  # whom modes do not stop: ask as somebody else would be answered
        allowed = os.access
        site.monkeypatch.setattr(
            os, "access", lambda path, mode: Path(path) != parent and allowed(path, mode)
        )


def full_disk(site: Site) -> None:
    site.monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))


def disk_fills_up(site: Site) -> None:
    def pwrite(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    site.monkeypatch.setattr(os, "pwrite", pwrite)


def no_more_threads(site: Site) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith("resm-compute"):
            raise RuntimeError("can't start new thread")
        start(thread)

    site.monkeypatch.setattr(threading.Thread, "start", refuse)


def output_is_here(site: Site) -> list[str]:
    empty = site.out.parent / "empty"
    empty.mkdir()
    site.monkeypatch.chdir(empty)
    return site.argv(out=".")


def unfinished(*options: str, damage: Callable[[Path], object] | None = None) -> Arrange:
    """A command after an interrupted merge, whose second shard (holding norm) may be damaged."""

    def arrange(site: Site) -> list[str]:
        site.leave_unfinished()
        if damage is not None:
            damage(site.partial / SHARDS[1])
        return site.argv(*SHARDED, *options)

    return arrange


def flip_last(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def foreign_partial(site: Site) -> None:
    """Somebody's own folder under the working name, and a merge that will fail."""
    occupied(site.partial)
    tensors(L0=full(float("nan"), 8, 8))(site)


def expert_is_partial(site: Site) -> list[object]:
    shutil.copytree(site.a, site.partial)
    return ["merge", "--base", site.base, "--expert", site.partial, "--resume", site.out]


def replaced_by(make: Callable[[Path], object]) -> Callable[[Path], object]:
    def replace(path: Path) -> None:
        path.unlink()
        make(path)

    return replace


RESUME = "--resume"


def journal(change: Callable[[list[bytes]], Iterable[bytes]]) -> Arrange:
    """Resume an interrupted merge after its journal was changed line by line."""

    def arrange(site: Site) -> list[str]:
        site.leave_unfinished()
        path = site.partial / "resm_journal.jsonl"
        path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))
        return site.argv(*SHARDED, RESUME)

    return arrange


def entry_with(**changes: object) -> Arrange:
    """The first shard's line in the journal, saying something else in the form it is written in."""

    def change(lines: list[bytes]) -> list[bytes]:
        first, other = sorted(lines[1:], key=lambda line: SHARDS[0].encode() not in line)
        return [lines[0], canonical_json({**json.loads(first), **changes}) + b"\n", other]

    return journal(change)


AGAIN = ("resm_journal.jsonl", f"shard {SHARDS[0]!r}", "not the result", "to have it merged again")
OUTPUTS = [
    bad("not empty", output("work/merged", occupied), "work/merged: exists and is not empty"),
    bad("not empty, with --resume", output("work/merged", occupied, RESUME), "is not empty"),
    bad("not empty, dry run", output("work/merged", occupied, "--dry-run"), "is not empty"),
    bad("a file", output("work/merged", Path.touch), "work/merged: exists and is not a folder"),
    bad("a link to itself", output("work/merged", lambda p: p.symlink_to(p)), "work/merged"),
    bad("in an input", output("in/expert-a/merged"), "lies in the input folder", "in/expert-a"),
    bad("an input", output("in/expert-b"), "lies in the input folder", "in/expert-b"),
    bad("in an input by a link", output("link/merged", link_to_expert), "in the input folder"),
    bad("around the inputs", output("in"), "in: exists and is not empty"),
    bad("the root", output("/"), "got /\n", "a folder with a name", code=2),
    bad("no parent", output("work/none/merged"), "work/none: no such folder"),
    bad("parent is a file", output("work/file/merged", file_as_parent), "file: no such folder"),
    bad("parent is read-only", read_only_parent, "work: no permission", "write"),
    bad("the current folder", output_is_here, "work/empty: ", "the current folder"),
    bad("300 letters", output("work/" + "x" * 300), "work/xxx", "too long"),
    bad("250 letters", output("work/" + "x" * 250), "work/xxx", "too long"),
    bad("disk is full", full_disk, "work: not enough disk space", "1,000 bytes free"),
    bad("disk fills up", disk_fills_up, "model.safetensors", "No space left", "free space"),
    bad("no more threads", no_more_threads, "resm: ", "thread"),
    bad("stale partial", unfinished(), "merged.partial: an unfinished merge", "--resume"),
    bad("partial is a file", output("work/merged", lambda p: Path(f"{p}.partial").touch(), RESUME),
        "merged.partial", "Not a directory"),
    bad("partial is foreign", foreign_partial, "merged.partial: ", "keep.txt", options=[RESUME]),
    bad("partial is foreign, not resumed", foreign_partial, "merged.partial: not an unfinished",
        "move it away"),
    bad("the name of a partial", output("work/merged.partial"), "such names", "another name"),
    bad("partial is an input", expert_is_partial, "lies in the input folder", "merged.partial"),
    bad("resumed by another recipe", unfinished(RESUME, "--method", "tsvm"),
        "merged.partial", "has another plan", "resume with the recipe it was started with"),
    bad("kept shard changed", unfinished(RESUME, damage=flip_last),
        f"{SHARDS[1]}: changed after it was finished", NORM),
    bad("kept result is a number", entry_with(results={L0: 3}), *AGAIN),
    bad("kept result is unknown", entry_with(results={L0: {"x": 1}}), *AGAIN),
    bad("kept shard is a folder", unfinished(RESUME, damage=replaced_by(Path.mkdir)), SHARDS[1]),
    bad("kept shard is a FIFO", unfinished(RESUME, damage=replaced_by(os.mkfifo)), SHARDS[1]),
]  # fmt: skip


# Verification


def verify(damage: Callable[[Path], object]) -> Arrange:
    """`resm verify` of a finished merge after damage to its folder."""

    def arrange(site: Site) -> list[object]:
        assert status(site.argv()) == 0
        damage(site.out)
        return ["verify", site.out]

    return arrange


def at(name: str, damage: Callable[[Path], object]) -> Arrange:
    return verify(lambda folder: damage(folder / name))


def manifest(**changes: object) -> Arrange:
    """A manifest that is sealed well and says something else; None drops a key."""

    def damage(folder: Path) -> None:
        path = folder / "resm_manifest.json"
        content = {**json.loads(path.read_text()), **changes}
        del content["sha256"]
        path.write_bytes(seal({k: v for k, v in content.items() if v is not None}))

    return verify(damage)


def in_header(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"I32"', 1))


W, MANIFEST, REPORT = "model.safetensors", "resm_manifest.json", "resm_report.json"
CONFIG_FILE = {"size": len(CONFIG), "sha256": hashlib.sha256(CONFIG.encode()).hexdigest()}
BASE_CONFIG = "in/base/config.json"
BAD_RANGE = {"w": {"file": W, "range": [-5, "x"], "sha256": "0"}}

VERIFICATIONS = [
    bad("no manifest", command("verify", "in/base"), f"in/base: no {MANIFEST}", "resm merge"),
    bad("no folder", command("verify", "nowhere"), f"nowhere: no {MANIFEST}"),
    bad("a file", command("verify", f"in/{A}"), f"in/{A}: no {MANIFEST}"),
    bad("300 letters", command("verify", "x" * 300), "xxxx"),
    bad("one bit of a tensor", at(W, flip_last), f"merged/{W}: tensor {NORM!r} differs"),
    bad("header", at(W, in_header), f"merged/{W}: its header differs"),
    bad("truncated", at(W, lambda p: os.truncate(p, 700)), f"{W}: 700 bytes", NORM),
    bad("longer", at(W, lambda p: os.truncate(p, 9000)), f"{W}: 9000 bytes instead of"),
    bad("gone", at(W, Path.unlink), f"merged/{W}: No such file"),
    bad("FIFO", at(W, replaced_by(os.mkfifo)), f"merged/{W}"),
    bad("folder", at(W, replaced_by(Path.mkdir)), f"merged/{W}"),
    bad("config", at("config.json", lambda p: p.write_text(CONFIG.upper())),
        "config.json: its content"),
    bad("report gone", at(REPORT, Path.unlink), f"{REPORT}: cannot be read"),
    bad("report changed", at(REPORT, lambda p: p.write_text(p.read_text() + " ")),
        f"{REPORT}: damaged"),
    bad("report FIFO", at(REPORT, replaced_by(os.mkfifo)), REPORT),
    bad("manifest changed", at(MANIFEST, lambda p: p.write_text(p.read_text().replace(NORM, L1))),
        f"{MANIFEST}: damaged"),
    bad("manifest of 300 MB", at(MANIFEST, lambda p: os.truncate(p, 300 << 20)),
        f"{MANIFEST}: too long", "314,572,800 bytes"),
    bad("manifest empty", at(MANIFEST, lambda p: p.write_text("")), f"{MANIFEST}: damaged"),
    bad("manifest deep", at(MANIFEST, lambda p: p.write_text("[" * 10**5)),
        f"{MANIFEST}: damaged"),
    bad("manifest no text", at(MANIFEST, lambda p: p.write_text('{"sha256": "\\ud800"}')),
        f"{MANIFEST}: damaged"),
    bad("manifest of the future", manifest(format=99), MANIFEST, "format 99 is unknown"),
    bad("manifest without tensors", manifest(tensors=None), MANIFEST),
    bad("manifest of a list", manifest(files=[]), MANIFEST),
    bad("manifest with bad ranges", manifest(tensors=BAD_RANGE), MANIFEST),
    bad("manifest looks outside", manifest(files={f"../../{BASE_CONFIG}": CONFIG_FILE}, tensors={}),
        MANIFEST, f"../../{BASE_CONFIG}", "outside"),
]  # fmt: skip


@rows(
    command=COMMANDS,
    output=OUTPUTS,
    verify=VERIFICATIONS,
)
def test_refused(case: Case, site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    argv = case.command(site)
    before = snapshot(site.root)
    capfd.readouterr()
    found = status(argv)
    out, err = capfd.readouterr()
    assert found == case.code, err
    assert out == ""
    assert_message(err, case.words)
    assert snapshot(site.root) == before


# Input that may merge or be refused, as long as the result is whole or nothing


def options(*words: str) -> Arrange:
    return lambda site: site.argv(*words)


def base_not_utf8(site: Site) -> None:
    path = os.fsdecode(os.fsencode(site.base) + b"\xff")
    os.rename(site.base, path)
    site.base = Path(path)


def output_not_utf8(site: Site) -> None:
    site.out = site.root / os.fsdecode(b"work/\xff")


def journal_is_fifo(site: Site) -> list[str]:
    site.leave_unfinished()
    replaced_by(os.mkfifo)(site.partial / "resm_journal.jsonl")
    return site.argv(*SHARDED, RESUME)


EITHER = [
    bad("outlier_power -1e5", options("--param", "outlier_power=-1e5")),
    bad("outlier_power 1e308", options("--param", "outlier_power=1e308")),
    bad("sigma 1e308", options("--param", "sigma=1e308")),
    bad("noise_floor 1e308", options("--param", "noise_floor=1e308")),
    bad("lambda 1e308", options("--lambda", "1e308", "--workers", "1")),
    bad("lambda -1e308", options("--lambda=-1e308", "--workers", "1")),
    bad("weights 1e308", options("--weight", "1e308", "--weight", "1e308")),
    bad("weights that cancel", options("--weight", "1", "--weight=-1", "--method", "linear")),
    bad("no rank", options("--param", "rank=fixed", "--param", "rank_fraction=0")),
    bad("a million workers", options("--workers", "1000000")),
    bad("base is not UTF-8", base_not_utf8),
    bad("output is not UTF-8", output_not_utf8),
    bad("config with half a character", text("base/config.json", '{"a": "\\ud800"}'),
        options=("--out-dtype", "float32")),
    bad("tags of rich in a name", everywhere(W, safetensors({"a[/b]": entry()}, bytes(16)))),
    bad("journal is a list", journal(lambda lines: [b"[1]\n"])),
    bad("journal is no text", journal(lambda lines: [b"\xff\n"])),
    bad("journal is a FIFO", journal_is_fifo),
    bad("journal is deep", journal(lambda lines: [b"[" * 100_000, b"\n"])),
    bad("journal with surrogates", journal(lambda lines: [b'{"plan_id":"\\ud800"}\n'])),
    bad("journal cut short", journal(lambda lines: [*lines[:-1], lines[-1][:50]])),
    bad("journal of unknown shards", journal(lambda lines: [lines[0], b'{"shard":"x"}\n'])),
    bad("journal without a shard", journal(lambda lines: [lines[0], b"{}\n"])),
    bad("journal without results", entry_with(results={})),
    bad("journal with numbers for digests", entry_with(digests=3)),
    bad("journal with a list for a shard", entry_with(shard=[])),
]  # fmt: skip


@rows(either=EITHER)
def test_all_or_nothing(case: Case, site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    argv = case.command(site)
    before = snapshot(site.root / "in")
    capfd.readouterr()
    found = status(argv)
    out, err = capfd.readouterr()
    assert snapshot(site.root / "in") == before
    if found == 0:
        assert status(["verify", site.out]) == 0
        assert not site.partial.exists()
        return
    assert found in (1, 2)
    assert out == ""
    assert_message(err, ["resm: "])
    assert not site.out.exists()


def test_the_site_merges(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    """Without damage there is nothing to refuse; otherwise the tables would prove nothing."""
    before = snapshot(site.root / "in")
    assert status(site.argv()) == 0
    assert status(["verify", site.out]) == 0
    assert snapshot(site.root / "in") == before
    argv = recipe(RECIPE)(site) or ()
    assert status([*argv[:-1], site.root / "by-recipe"]) == 0
    merged = [(folder / W).read_bytes() for folder in (site.out, site.root / "by-recipe")]
    assert merged[0] == merged[1]
    site.out = site.root / "resumed"
    site.partial = site.root / "resumed.partial"
    assert status(unfinished(RESUME)(site) or ()) == 0


def test_the_bomb_is_live(site: Site) -> None:
    """What the `.bin` cases hold does run code in a loader that lets it."""
    binary(torch_bytes({"w": BOMB}))(site)
    torch.load(site.a / "pytorch_model.bin", weights_only=False)
    assert (site.root / "code-ran").is_dir()


def test_brackets_in_a_tensor_name() -> None:
    """A name is shown on the progress bar as it is, tags of rich or not."""
    screen = io.StringIO()
    progress = BarProgress(Console(file=screen, force_terminal=True, width=120))
    progress.start(2)
    progress.advance(1, "layers[/0].weight")
    progress.stop()
    assert "layers[/0].weight" in screen.getvalue()


def test_progress_that_is_taken_back(caplog: pytest.LogCaptureFixture) -> None:
    """As where a cluster loses its only worker."""
    caplog.set_level("INFO")
    progress = LogProgress(interval=0.0)
    progress.start(1000)
    progress.advance(500, "w")
    progress.advance(-500, "")
    progress.advance(0, "empty")
    progress.advance(250, "w")
    assert len(caplog.messages) == 2


def test_brackets_in_a_pattern(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    """`[/0]` is a shell pattern, not a tag of the table that shows it."""
    argv = site.argv("--dry-run", "--param", "exclude=['*[/.]0.weight']")
    assert status(argv) == 0
    assert "excluded by *[/.]0.weight" in capfd.readouterr().out


def test_input_changed_during_the_merge(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    """What was read may be a mixture: never finished, finished shards kept."""
    check = executor._check_inputs_unchanged

    def change(plan: MergePlan) -> None:
        flip_last(site.a / W)
        check(plan)

    site.monkeypatch.setattr(executor, "_check_inputs_unchanged", change)
    assert status(site.argv(*SHARDED)) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert_message(err, [A, "the file changed after the merge was planned"])
    assert not site.out.exists()
    assert {p.name for p in site.partial.iterdir()} == {*SHARDS, "resm_journal.jsonl"}


# The real command, in a process of its own


def large(site: Site) -> None:
    for folder in site.models:
        write_model(folder, {L0: torch.randn(256, 256)})


PROCESSES = [
    bad("no arguments", command(), "usage: resm", code=2),
    bad("truncated file", raw(lambda good: good[:-1]), A, "data do not end with the file"),
    bad("Hub id, offline", model_argument("nobody/nothing-here"),
        "nobody/nothing-here", "the Hub is out of reach"),
    bad("file size limit", large, f"merged.partial/{W}", "File too large", "raise the limit"),
]  # fmt: skip


@pytest.mark.timeout(120)
@rows(process=PROCESSES)
def test_process(case: Case, site: Site, tmp_path: Path) -> None:
    """None of them has a network, nor may it write a file above 128 blocks (64 or 128 kB)."""
    argv = case.command(site)
    before = snapshot(site.root)
    settings = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    script = Path(sys.executable).with_name("resm")
    done = subprocess.run(
        ["sh", "-c", 'ulimit -f 128; exec "$@"', "sh", script, *argv],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, **settings},
    )
    assert done.returncode == case.code, done.stderr
    assert done.stdout == ""
    assert_message(done.stderr, case.words)
    assert snapshot(site.root) == before
