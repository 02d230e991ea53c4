"""The HTML report: what it says, what it cannot be made to do, and how it looks in a browser."""

from __future__ import annotations

import html
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

import resm_kernels
from resm_kernels.checkpoint.files import seal, unseal
from resm_kernels.checkpoint.journal import MANIFEST, PAGE, REPORT
from resm_kernels.cli import main
from resm_kernels.engine import flow, target
from resm_kernels.engine.measures import POINTS, spectrum_points, spectrum_positions
from resm_kernels.engine.result import MergeReport
from resm_kernels.errors import VerificationError
from resm_kernels.linalg import leading_subspaces, subspace_overlap
from resm_kernels.report.html import merge_page
from resm_kernels.report.page import Scale, timeline, tiny
from tests.adapters import write_adapter
from tests.checkpoints import contents, fine_tuned, make_state, save, save_family
from tests.reports import llama_shapes, made_up
from tests.test_merge import load

HOSTILE = (
    "<script>alert(1)</script>",
    '"onload="alert(1)',
    "</style></script><img src=x onerror=alert(1)>",
    "a&amp;<!--\u2028\u202e\x00\ud800",
    "{{7*7}}${7*7}",
)


class Elements(HTMLParser):
    """Every element with its attributes, and the text of scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.found and self.found[-1][0] == "script":
            self.scripts[-1] += data


def data_of(page: str) -> Any:
    return json.loads(Elements(page).scripts[0])


# What a merge measures


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    return save_family(tmp_path_factory.mktemp("family"))


@pytest.mark.parametrize("method", ["tsvm", "resm", "iso_c"])
def test_norms_and_retention_are_those_of_the_stored_weights(
    method: str, family: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base, experts = family
    report = resm_kernels.merge(base, experts, tmp_path / "out", method)
    start = {n: t.double() for n, t in load(base).items()}
    merged = load(tmp_path / "out")
    tuned = [load(expert) for expert in experts]
    for name, result in report.tensors.items():
        found = result.measures
        assert found is not None
        delta = merged[name].double() - start[name]
        changes = [one[name].double() - start[name] for one in tuned]
        assert found.merged_norm == pytest.approx(float(delta.norm()), rel=1e-3)
        assert found.base_norm == pytest.approx(float(start[name].norm()), rel=1e-3)
        for t, change in enumerate(changes):
            kept = float((delta * change).sum() / change.square().sum())
            assert found.delta_norms[t] == pytest.approx(float(change.norm()), rel=1e-3)
            assert found.retentions[t] == pytest.approx(kept, rel=1e-3, abs=1e-3)
        between = float((changes[0] * changes[2]).sum() / changes[0].norm() / changes[2].norm())
        assert found.cosines[1] == pytest.approx(between, rel=1e-3, abs=1e-4)


def test_spectra_are_the_kept_singular_values(
    family: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base, experts = family
    report = resm_kernels.merge(base, experts, tmp_path / "out", "tsvm")
    name = "model.layers.0.mlp.up_proj.weight"
    found = report.tensors[name].measures
    assert found is not None
    assert found.spectrum_at == (1, 2, 3, 4, 5)
    for expert, spectrum in zip(experts, found.spectra, strict=True):
        exact = torch.linalg.svdvals(load(expert)[name].double() - load(base)[name].double())
        assert spectrum == pytest.approx(exact[:5].tolist(), rel=1e-3)


def test_adapters_are_measured_without_forming_them_whole(tmp_path: Path) -> None:
    state = make_state()
    base = save(tmp_path / "base", state)
    name = "model.layers.0.mlp.up_proj"
    generator = torch.Generator().manual_seed(3)
    pair = {
        f"base_model.model.{name}.lora_A.weight": torch.randn(2, 16, generator=generator),
        f"base_model.model.{name}.lora_B.weight": torch.randn(24, 2, generator=generator),
    }
    adapter = write_adapter(tmp_path / "adapter", pair)
    whole = save(tmp_path / "whole", fine_tuned(state, 5))
    report = resm_kernels.merge(base, [adapter, whole], tmp_path / "out", "tsvm")
    found = report.tensors[f"{name}.weight"].measures
    assert found is not None
    a, b = pair.values()
    delta = 2.0 * (b.double() @ a.double())
    merged = load(tmp_path / "out")[f"{name}.weight"].double() - state[f"{name}.weight"].double()
    assert found.delta_norms[0] == pytest.approx(float(delta.norm()), rel=1e-3)
    kept = float((merged * delta).sum() / delta.square().sum())
    assert found.retentions[0] == pytest.approx(kept, rel=1e-3)
    assert len(found.spectra[0]) == 2


def test_an_expert_without_a_change_has_no_retention(tmp_path: Path) -> None:
    state = make_state()
    base = save(tmp_path / "base", state)
    experts = [save(tmp_path / "a", fine_tuned(state, 1)), save(tmp_path / "b", state)]
    report = resm_kernels.merge(base, experts, tmp_path / "out", "tsvm")
    for result in report.tensors.values():
        assert result.measures is not None
        assert result.measures.retentions[1] is None
    assert (tmp_path / "out" / PAGE).is_file()


def test_overlap_is_zero_apart_one_at_chance_and_known_for_equal_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    eye = torch.eye(40, dtype=torch.float64)
    apart = [
        leading_subspaces(eye[:, rows] @ eye[:, rows].T, 8) for rows in (slice(8), slice(8, 16))
    ]
    assert subspace_overlap(apart).interference == 0.0
    assert subspace_overlap(apart).pairs == (0.0,)
    noise = [torch.randn(256, 192, generator=generator) for _ in range(3)]
    by_chance = subspace_overlap([leading_subspaces(x, 40) for x in noise])
    assert by_chance.interference == pytest.approx(1.0, abs=0.05)
    assert all(0.1 < pair < 0.3 for pair in by_chance.pairs)
    same = leading_subspaces(noise[0], 40)
    equal = subspace_overlap([same] * 3, [1.0, -1.0, 1.0])
    assert equal.pairs == pytest.approx((1.0, 1.0, 1.0))
    # (J - I)^2 x S summed, over its value for random directions
    total, square = float(same.values.sum()), float(same.values.square().sum())
    terms = 3 * math.sqrt(2 * square) + 6 * math.sqrt(square)
    chance = 40 * 40 * terms * math.sqrt(2 / math.pi / (256 * 192))
    assert equal.interference == pytest.approx(12 * total / chance)
    none = leading_subspaces(torch.zeros(4, 4), 2)
    assert subspace_overlap([none, none]) == type(equal)(0.0, (0.0,))


def test_reports_of_many_tensors_stay_small() -> None:
    assert spectrum_points(291, 3) == POINTS
    count = spectrum_points(40_000, 3)
    positions = spectrum_positions(1365, 64)
    assert positions[:3] == (1, 2, 3)
    assert positions[-1] == 1365
    assert len(positions) < 64
    shapes = {f"model.layers.{i}.mlp.up_proj.weight": (1024, 1024) for i in range(400)}
    report = made_up(shapes)
    for result in report.tensors.values():
        assert result.measures is not None
        kept = spectrum_positions(341, count)
        object.__setattr__(result.measures, "spectrum_at", kept)
        spectra = tuple(tuple(s[: len(kept)]) for s in result.measures.spectra)
        object.__setattr__(result.measures, "spectra", spectra)
    assert len(seal(report.to_dict())) * 100 < 80e6


# What lies in the output


def test_the_manifest_does_not_know_the_page_and_verify_does(
    family: tuple[Path, list[Path]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, experts = family
    resm_kernels.merge(base, experts, tmp_path / "with")
    resm_kernels.merge(base, experts, tmp_path / "without", no_report=True)
    drawn, bare = contents(tmp_path / "with"), contents(tmp_path / "without")
    assert drawn.keys() - bare.keys() == {PAGE}
    assert {n for n in bare if bare[n] != drawn[n]} == {REPORT}
    assert b"measures" not in drawn[MANIFEST]
    assert resm_kernels.verify(tmp_path / "with").files == len(drawn)
    assert resm_kernels.verify(tmp_path / "without").files == len(bare)
    for damage in (lambda p: p.unlink(), lambda p: p.write_bytes(p.read_bytes()[:-30])):
        saved = (tmp_path / "with" / PAGE).read_bytes()
        damage(tmp_path / "with" / PAGE)
        with pytest.raises(VerificationError, match=PAGE):
            resm_kernels.verify(tmp_path / "with")
        (tmp_path / "with" / PAGE).write_bytes(saved)
    resm_kernels.verify(tmp_path / "with")


def test_a_page_that_cannot_be_drawn_loses_no_merge(
    family: tuple[Path, list[Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    base, experts = family

    def broken(report: MergeReport) -> str:
        raise ZeroDivisionError("no picture")

    monkeypatch.setattr("resm_kernels.api.merge_page", broken)
    resm_kernels.merge(base, experts, tmp_path / "out")
    assert "no picture" in caplog.text
    assert not (tmp_path / "out" / PAGE).exists()
    resm_kernels.verify(tmp_path / "out")


def test_report_draws_anew_what_the_merge_drew(
    family: tuple[Path, list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, experts = family
    out = tmp_path / "out"
    resm_kernels.merge(base, experts, out, "tsvm")
    before = (out / PAGE).read_bytes()
    assert main(["report", str(out), "-o", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").read_bytes() == before
    assert main(["report", str(out)]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "page.html"), str(out / PAGE)]
    assert (out / PAGE).read_bytes() == before
    resm_kernels.verify(out)


@pytest.mark.parametrize("target", [".", "/", "folder", ""])
def test_a_page_that_cannot_be_written_leaves_nothing(
    target: str,
    family: tuple[Path, list[Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    resm_kernels.merge(*family, "out", "ties")
    os.mkdir("folder")
    before = contents(tmp_path)
    assert main(["report", "out", "-o", target]) == 1
    assert "cannot be written" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_a_resumed_merge_keeps_what_was_measured(
    family: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, experts = family
    whole = resm_kernels.merge(base, experts, tmp_path / "whole", shard_size="700B", workers=1)
    original, left = flow.merge_planned, 6

    def breaking(*given: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError("stopped")
        return original(*given)

    with monkeypatch.context() as patch:
        patch.setattr(flow, "merge_planned", breaking)
        with pytest.raises(OSError, match="stopped"):
            resm_kernels.merge(base, experts, tmp_path / "out", shard_size="700B", workers=1)
    resumed = resm_kernels.merge(
        base, experts, tmp_path / "out", shard_size="700B", workers=1, resume=True
    )
    assert resumed.kept_shards
    for name, result in whole.tensors.items():
        assert resumed.tensors[name].measures == result.measures
    resm_kernels.verify(tmp_path / "out")


def test_sweeps_have_a_page_each(family: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, experts = family
    resm_kernels.sweep(base, experts, tmp_path / "out", "tsvm", lambdas=[0.5, 1.0])
    pages = sorted((tmp_path / "out").glob(f"*/{PAGE}"))
    assert len(pages) == 2
    assert pages[0].read_text() != pages[1].read_text()


def test_reports_of_earlier_versions_are_drawn(
    family: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base, experts = family
    out = tmp_path / "out"
    resm_kernels.merge(base, experts, out)
    content = unseal(out / REPORT)
    for new in ("inputs", "drawn"):
        del content[new]
    for tensor in content["tensors"].values():
        del tensor["measures"]
    (out / REPORT).write_bytes(seal(content))
    (out / PAGE).unlink()
    resm_kernels.verify(out)
    page = resm_kernels.draw_report(out).read_text()
    assert "Outlier weight" in page
    assert "Retention" not in page


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(recipe={}),
        lambda c: c.update(recipe={"models": 3}),
        lambda c: c.update(seconds="long"),
        lambda c: c.update(stage_seconds=[1, 2]),
        lambda c: c.update(timeline={"read 0": 5}),
        lambda c: c.update(timeline=[1, 2]),
        lambda c: c.update(timeline={"": [], "x": [None, "a", -1e308, 1e308, 3], "y": [9, 1, 5]}),
        lambda c: c.update(peak_device_memory=3),
        lambda c: next(iter(c["tensors"].values())).update(memory_notes=3),
        lambda c: c.update(left_out=5),
        lambda c: c["tensors"].update(x={"name": 1}),
        lambda c: c["tensors"].update(x={"name": "x", "rule": "r", "reason": 0, "shape": 7}),
        lambda c: next(iter(c["tensors"].values())).update(measures={"base_norm": "x"}),
        lambda c: next(iter(c["tensors"].values())).update(ranks=[["a"], {}, None]),
        lambda c: next(iter(c["tensors"].values())).update(seconds=None),
        lambda c: c["recipe"].update(parameters=json.loads("[" * 400 + "]" * 400)),
    ],
)
def test_forged_reports_are_refused_or_drawn_never_a_traceback(
    change: Any, family: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base, experts = family
    out = tmp_path / "out"
    resm_kernels.merge(base, experts, out, no_report=True)
    content = unseal(out / REPORT)
    change(content)
    (out / REPORT).write_bytes(seal(content))
    assert main(["report", str(out)]) in (0, 1)


# What the page says


def test_the_timeline_shows_when_threads_were_busy() -> None:
    line, busy = timeline([0.0, 2.0, 3.0, 9.0, 9.001, 10.0, 4.0], 10.0)
    assert busy == pytest.approx(8.999)
    assert 'd="M0 5H200M300 5H1000"' in line
    for edges in ([], [None, 1.0], [5.0, 11.0], [-1.0, 1.0], [3.0, 2.0]):
        assert timeline(edges, 10.0)[1] == 0.0
    page = html.unescape(merge_page(made_up(llama_shapes(1))))
    assert "When threads were busy" in page
    shown = re.findall(r"<td>((?:read|compute|write|finish) \d)<td>(\d+) %", page)
    compute = [("compute 0", "99"), ("compute 1", "99")]
    assert shown == [("read 0", "5"), *compute, ("write 0", "2"), ("finish 0", "1")]
    assert "When threads were busy" not in merge_page(made_up(llama_shapes(1), timeline={}))


def test_the_page_of_a_merge_says_what_was_done(
    family: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base, experts = family
    report = resm_kernels.merge(base, experts, tmp_path / "out", parameters={"lambda": 0.75})
    page = (tmp_path / "out" / PAGE).read_text()
    text = html.unescape(page)
    for part in (str(base), *map(str, experts), "lambda: 0.75", "resm merge of 3 models"):
        assert part in text
    assert all(entry["digest"][:12] in text for entry in report.inputs)
    for title in ("Retention", "Interference between experts", "Outlier weight", "Sparsity"):
        assert f"<h3>{title}</h3>" in page
    data = data_of(page)
    cell = next(c for c in data["cells"] if c["t"] == "model.layers.1.mlp.up_proj.weight")
    result = report.tensors[cell["t"]]
    assert result.measures is not None
    shown = [row.split("|") for row in cell["r"]]
    assert [float(row[6]) for row in shown] == pytest.approx(result.measures.retentions, rel=6e-3)
    assert [int(row[2]) for row in shown] == list(result.ranks)
    facts = {data["texts"][a]: data["texts"][b] for a, b in cell["f"]}
    assert float(facts["interference"]) == pytest.approx(result.measures.interference, rel=6e-3)


def test_notes_that_many_tensors_share_stand_together(tmp_path: Path) -> None:
    state = make_state()
    base = save(tmp_path / "base", state)
    equal = [save(tmp_path / f"e{t}", fine_tuned(state, 1)) for t in range(2)]
    resm_kernels.merge(base, equal, tmp_path / "out", "tsvm")
    page = (tmp_path / "out" / PAGE).read_text()
    assert page.count("null directions left at zero") < 6
    assert "Fallbacks, clamps and warnings" in page


def test_an_element_wise_merge_has_a_page_too(
    family: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base, experts = family
    report = resm_kernels.merge(base, experts, tmp_path / "out", "linear")
    assert all(result.measures is None for result in report.tensors.values())
    assert "was not measured" in (tmp_path / "out" / PAGE).read_text()


def test_an_8b_model_takes_310_kb_and_the_same_text_each_time() -> None:
    report = made_up(llama_shapes(32))
    page = merge_page(report)
    assert len(report.tensors) == 291
    assert len(page.encode()) < 310_000
    assert page == merge_page(MergeReport.from_dict(json.loads(json.dumps(report.to_dict()))))


def test_mixtures_and_wide_models_stay_bounded() -> None:
    shapes = {
        f"model.layers.{i}.mlp.experts.{j}.{n}.weight": (1024, 2048)
        for i in range(30)
        for j in range(64)
        for n in ("gate_proj", "up_proj", "down_proj")
    }
    page = merge_page(made_up(shapes))
    assert len(page.encode()) < 400_000
    assert "mlp.experts.*.up_proj of layer 7: means of 64 weights" in page
    odd = {f"a{i}.{j}.w{i}.weight": (8, 8) for i in range(300) for j in (0, 10**8)}
    page = merge_page(made_up(odd))
    assert "have no place in these maps" in page


def test_nothing_in_names_or_recipes_reaches_the_browser_as_markup() -> None:
    shapes = {f"model.layers.{i}.{text}.weight": (64, 64) for i, text in enumerate(HOSTILE)}
    models = [{"model": text, "parameters": {"weight": text}} for text in HOSTILE[:3]]
    recipe = {"merge_method": "resm", "base_model": HOSTILE[2], "models": models, HOSTILE[0]: "x"}
    left_out = dict(zip(HOSTILE, reversed(HOSTILE), strict=True))
    page = merge_page(
        made_up(
            shapes,
            recipe=recipe,
            output=HOSTILE[1],
            plan_id=HOSTILE[2],
            device=HOSTILE[0],
            versions={HOSTILE[2]: HOSTILE[1]},
            stage_seconds={HOSTILE[0]: 1.0},
            timeline={text: [0.0, 1.0, 1.5] for text in HOSTILE},
            peak_device_memory=dict.fromkeys(HOSTILE, 1),
            left_out=left_out,
            inputs=[{"model": text, "digest": text} for text in HOSTILE[:4]],
        )
    )
    page.encode()
    elements = Elements(page).found
    harmless = Elements(merge_page(made_up({"model.layers.0.x.weight": (64, 64)}))).found
    names = {name for _, attributes in harmless for name in attributes}
    assert {tag for tag, _ in elements} <= {tag for tag, _ in harmless} | {"details"}
    assert {name for _, attributes in elements for name in attributes} <= names | {"title"}
    assert page.lower().count("</script") == 2
    assert page.lower().count("</style") == 1
    assert "\u202e" not in page
    assert any("<script>" in cell["t"] for cell in data_of(page)["cells"])


def test_the_page_forbids_itself_the_network() -> None:
    page = merge_page(made_up(llama_shapes(1)))
    elements = Elements(page).found
    (policy,) = [a["content"] for t, a in elements if a.get("http-equiv")]
    assert policy is not None
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy
    assert not [a for _, a in elements if {"src", "href", "style", "onclick"} & a.keys()]
    without_svg = page.replace("http://www.w3.org/2000/svg", "")
    assert not re.findall(r"https?://|url\(|@import", without_svg)


def test_numbers_fit_their_cells() -> None:
    values = (0, 1e-9, 0.004, 0.0123, 0.5, 0.9949, 0.996, 1, 9.94, 9.96, 341, 1365, 14336, -0.5)
    assert [tiny(v) for v in values] == [
        "0", "1e-9", "4e-3", ".01", ".50", ".99", "1.0", "1.0", "9.9", "10", "341", "1365", "1e4",
        "-.50",
    ]  # fmt: skip
    assert Scale.of([0.5, 1.0, 4.0], ratio=True).kind(1.0) == "d5"
    assert Scale.of([0.5, 1.0, 4.0], ratio=True).kind(0.0) == "d0"
    assert [Scale.of([2.0, 4.0]).kind(v) for v in (2.0, 3.0, 4.0)] == ["s0", "s5", "s10"]
    assert Scale.of([3.0, 3.0]).kind(3.0) == "s5"


# In a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("no Chromium")
    with sync_api.sync_playwright() as playwright:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        opened = playwright.chromium.launch(executable_path=path, args=arguments)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / PAGE
    path.write_text(merge_page(made_up(llama_shapes(32))))
    return path


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_a_cell_is_clicked_and_its_numbers_are_read(
    scheme: str, width: int, browser: Any, page_file: Path, tmp_path: Path
) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(page_file.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert colour == {"dark": "rgb(16, 21, 26)", "light": "rgb(246, 248, 250)"}[scheme]

    cell = page.locator("td[data-k]").nth(3)
    row = cell.evaluate("td => td.parentNode.cells[0].textContent")
    cell.click()
    detail = page.locator("#detail")
    name = detail.locator("h3").inner_text()
    assert name == f"model.layers.3.{row}.weight"
    lines = detail.locator("tbody tr")
    assert lines.count() == 3
    retention = float(lines.nth(0).locator("td").last.inner_text())
    assert abs(retention - float(cell.inner_text())) < 0.06
    assert detail.locator("polyline").count() == 3
    box = detail.bounding_box()
    assert box["y"] + box["height"] <= 900 + 1
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width

    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert detail.locator("h3").inner_text() == f"model.layers.4.{row}.weight"
    detail.locator("select").select_option(label="lm_head.weight")
    assert detail.locator("h3").inner_text() == "lm_head.weight"
    assert detail.locator("polyline").count() == 0
    detail.locator("button").click()
    assert "on" not in (detail.get_attribute("class") or "").split()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert len(page.screenshot(path=tmp_path / "page.png")) > 20_000
    assert not said
    assert asked == [page_file.as_uri()]
    page.close()


def test_a_hostile_page_runs_nothing(browser: Any, tmp_path: Path) -> None:
    shapes = {f"model.layers.{i}.{text}.weight": (64, 64) for i, text in enumerate(HOSTILE)}
    path = tmp_path / "page.html"
    path.write_text(merge_page(made_up(shapes, output=HOSTILE[2])), errors="backslashreplace")
    page = browser.new_page()
    dialogs: list[str] = []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    page.goto(path.as_uri())
    for i in range(len(HOSTILE)):
        page.locator("#detail select").select_option(value=str(i))
    page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), {text: 'alert(2)'}))"
    )
    assert not dialogs
    assert page.locator("img").count() == 0
    page.close()


def test_without_javascript_the_maps_are_there(browser: Any, page_file: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(page_file.as_uri())
    assert page.locator(".heat td[data-k]").first.is_visible()
    assert not page.locator("#detail").is_visible()
    assert page.locator("noscript p").is_visible()
    context.close()


def test_it_prints(browser: Any, page_file: Path) -> None:
    page = browser.new_page(color_scheme="dark")
    page.goto(page_file.as_uri())
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    widest = "Math.max(...[...document.querySelectorAll('.heat')].map(t => t.offsetWidth))"
    page.set_viewport_size({"width": 718, "height": 1000})  # A4 less its margins
    assert page.evaluate(widest) <= 718
    page.close()


def test_measures_survive_json() -> None:
    report = made_up(llama_shapes(1))
    again = MergeReport.from_dict(json.loads(json.dumps(report.to_dict())))
    assert asdict(again) == asdict(report)
    assert target.PAGE == PAGE
