"""The corpus through the real command: one clear answer, in bounded memory and time."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

from tests.hostile.cases import CORPUS, Case, Site
from tests.hostile.child import Answer, run
from tests.hostile.files import snapshot

CASES = [pytest.param(case, id=f"{area}: {case.name}") for area, t in CORPUS.items() for case in t]


@pytest.fixture(scope="module")
def server() -> ForkServerContext:
    """Forks a process for each case from one that has torch loaded and no threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.hostile.child"])
    return context


def answer(server: ForkServerContext, root: Path, argv: list[str], log: Path) -> Answer:
    log.mkdir()
    ours, theirs = server.Pipe(duplex=False)
    process = server.Process(target=run, args=(root, argv, log, theirs))
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
        assert (site.out / "resm_manifest.json").is_file()
        after = {name: kept for name, kept in after.items() if not name.startswith("work/merged")}
    else:
        assert out == ""
        assert err.startswith(("resm: ", "usage: "))
        assert [word for word in case.words if word not in err] == [], err
        assert "Traceback" not in err
        assert not {"\x1b", "\x07"} & set(err)
        assert len(err) < 50_000
    assert after == before
