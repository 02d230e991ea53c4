"""The corpus through the real command: one clear answer, in bounded memory and time."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

from tests.hostile.cases import Case, Site
from tests.hostile.child import Answer, run, run_with_closed_hub
from tests.hostile.corpus import CORPUS
from tests.hostile.files import snapshot

CASES = [pytest.param(case, id=f"{area}: {case.name}") for area, t in CORPUS.items() for case in t]


@pytest.fixture(scope="module")
def server() -> ForkServerContext:
    """Forks a process for each case from one that has torch loaded and no threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.hostile.child"])
    return context


def answer(
    server: ForkServerContext,
    root: Path,
    argv: list[str],
    log: Path,
    work: Callable[..., None] = run,
) -> Answer:
    log.mkdir()
    ours, theirs = server.Pipe(duplex=False)
    process = server.Process(target=work, args=(root, argv, log, theirs))
    process.start()
    theirs.close()
    try:
        assert ours.poll(60), "no answer within a minute"
        found: Answer = ours.recv()
    finally:
        process.kill()
        process.join()
    return found


@pytest.mark.timeout(90)
@pytest.mark.parametrize("case", CASES)
def test_hostile(
    case: Case, tmp_path_factory: pytest.TempPathFactory, server: ForkServerContext
) -> None:
    """Refused by name or merged; bounded; nothing written elsewhere, no socket, no process."""
    top = tmp_path_factory.mktemp("site")  # no word of the case's name
    site = Site(top / "site")
    argv = case.command(site)
    before = snapshot(site.root)
    found = answer(server, site.root, argv, top / "log")
    out, err = ((top / "log" / name).read_text() for name in ("out", "err"))
    print(f"HOSTILE {found.megabytes:.0f} MB {found.seconds:.2f} s")
    assert found.status == case.code, err
    assert found.forbidden == []
    assert found.megabytes <= case.megabytes
    assert found.seconds <= case.seconds
    after = snapshot(site.root)
    if case.code == 0:
        assert list(site.out.rglob("resm_manifest.json"))
        after = {name: kept for name, kept in after.items() if not name.startswith("work/merged")}
    else:
        assert out == ""
        assert err.startswith(("resm: ", "usage: "))
        assert [word for word in case.words if word not in err] == [], err
        assert "Traceback" not in err
        assert not {"\x1b", "\x07"} & set(err)
        assert len(err) < 50_000
    assert after == before


@pytest.mark.timeout(90)
def test_only_a_hub_id_opens_a_socket(tmp_path: Path, server: ForkServerContext) -> None:
    """Every local case above opened none; this one asks the Hub, here a closed port."""
    site = Site(tmp_path / "site")
    argv = ["merge", "--base", str(site.base), "--expert", "some/model", str(site.out)]
    found = answer(server, site.root, argv, tmp_path / "log", run_with_closed_hub)
    assert found.status == 130
    assert [event for event in found.forbidden if "127.0.0.1" in event]


FORBIDDEN = """
import os, socket, subprocess, sys
from pathlib import Path
from tests.hostile.guard import Guard
root = Path(sys.argv[1])
(root / "in").mkdir()
(root / "in" / "code.py").write_text("1")
(root / "ours").mkdir()
guard = Guard([root / "ours"], root / "in")
open(root / "ours" / "file", "w").close()
open(root / "ours" / "file").close()
os.rename(root / "ours" / "file", root / "ours" / "other")
os.unlink(root / "ours" / "other")
open(os.devnull, "w").close()
assert guard.found == [], guard.found
deeds = [
    lambda: open(root / "file", "w").close(),
    lambda: open(root / "ours" / ".." / "file", "a").close(),
    lambda: os.mkdir(root / "oursandmore"),
    lambda: os.rename(root / "file", root / "ours" / "file"),
    lambda: os.symlink(root / "in", root / "link"),
    lambda: os.chmod(root / "in", 0o700),
    lambda: subprocess.run(["true"]),
    lambda: os.system("true"),
    lambda: socket.socket().connect_ex(("127.0.0.1", 1)),
    lambda: exec(compile("1", root / "in" / "code.py", "exec")),
    lambda: os.unlink("code.py", dir_fd=os.open(root / "in", os.O_RDONLY)),
]
for number, deed in enumerate(deeds):
    guard.found.clear()
    deed()
    assert guard.found, number
print("heard", len(deeds))
"""


def test_the_guard_hears_all_it_must(tmp_path: Path) -> None:
    """Without this the corpus would prove nothing about writes, sockets and code."""
    command = [sys.executable, "-c", FORBIDDEN, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout == "heard 11\n", done.stderr
