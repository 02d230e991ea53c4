"""The documentation against the package: recipes build, names are there, examples have types."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import resm_kernels
from resm_kernels import errors
from resm_kernels.errors import RecipeError
from resm_kernels.methods import METHODS
from resm_kernels.recipe import (
    MAX_OUTPUTS,
    NOT_YET,
    OUTPUT_KEYS,
    TOP_KEYS,
    build_recipes,
    parse_yaml,
)

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MARKER = "<!-- mergekit only -->\n"


def blocks(page: Path, language: str) -> list[tuple[bool, str]]:
    """Fenced blocks of a page, and whether the marker stands before them."""
    fence = re.compile(rf"({re.escape(MARKER)})?^```{language}\n(.*?)^```$", re.M | re.S)
    return [(bool(marked), text) for marked, text in fence.findall(page.read_text())]


RECIPES = [
    pytest.param(text, marked, id=f"{page.name}-{number}")
    for page in PAGES
    for number, (marked, text) in enumerate(blocks(page, "yaml"))
    if "merge_method" in text
]


@pytest.mark.parametrize(("text", "marked"), RECIPES)
def test_recipes_build(text: str, marked: bool) -> None:
    """Every one but those that say otherwise, and nothing in them is ignored."""
    content = parse_yaml(text, "page")
    if marked:
        with pytest.raises(RecipeError):
            build_recipes(content, "page")
        return
    recipes = build_recipes(content, "page")
    assert [recipe.ignored for recipe in recipes.values()] == [()] * len(recipes)


def test_pages_have_recipes() -> None:
    assert len(RECIPES) >= 8


def test_the_page_of_recipes_is_whole() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text()
    keys = re.findall(r"^\| `(\w+)` \|", text.partition("## Parameters")[0], re.M)
    assert sorted(keys) == sorted(TOP_KEYS)
    outputs = text.partition("## Several outputs")[2].partition("\n## ")[0]
    assert all(f"`{key}`" in outputs for key in OUTPUT_KEYS if key != "name")
    assert f"At most {MAX_OUTPUTS} outputs" in outputs
    refused = text.partition("## What of mergekit")[2]
    assert [key for key in NOT_YET if f"`{key}" not in refused] == []


def test_the_page_of_the_api_is_whole() -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    assert [n for n in resm_kernels.__all__ if n != "__version__" and f"| `{n}(" not in text] == []
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    names = [kind.__name__ for kind in kinds if issubclass(kind, Exception)]
    assert [n for n in names if f"`{n}`" not in text and f".{n}`" not in text] == []


def test_the_readme_lists_every_method() -> None:
    table = (ROOT / "README.md").read_text().partition("## Methods")[2]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert sorted(re.findall(r"`(\w+)`", "".join(rows))) == sorted(METHODS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        name, _, anchor = target.partition("#")
        if "://" in target:
            continue
        other = page if not name else page.parent / name
        assert other.exists(), target
        headings = re.findall(r"^#+ (.*)$", other.read_text(), re.M) if anchor else []
        slugs = [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings]
        assert not anchor or anchor in slugs, target


TYPED = """
import resm_kernels
from resm_kernels.checkpoint.manifest import Verification
from resm_kernels.engine.plan import MergePlan
from resm_kernels.engine.result import MergeReport
report_: MergeReport = resm_kernels.merge("b", ["a"], "o", device="cpu", resume=True)
plan_: MergePlan = resm_kernels.plan("b", ["a"])
sweep_: dict[str, MergeReport] = resm_kernels.sweep("b", ["a"], "o", lambdas=[1.0])
verify_: Verification = resm_kernels.verify("o")
"""
WRONG = {
    "resm_kernels.merg()": 'no attribute "merg"',
    'resm_kernels.merge("b", ["a"], outptu="o")': 'argument "outptu"',
    'resm_kernels.merge("b", ["a"], 7)': "incompatible type",
    'resm_kernels.sweep("b", ["a"], "o", lambdas="1")': "incompatible type",
    'x: int = resm_kernels.verify("o")': "Incompatible types in assignment",
}
"""Lines that must not pass, and what is said of them."""


def test_user_code_has_types(tmp_path: Path) -> None:
    """`mypy --strict` of the examples, against the package as an installation has it."""
    pytest.importorskip("mypy")
    site = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", site], check=True)
    (packages,) = site.glob("lib/python*/site-packages")
    for package in ("resm_kernels", "python/resm_backends"):
        (packages / Path(package).name).symlink_to(ROOT / package)
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))
    (tmp_path / "mypy.ini").write_text("[mypy-torch.*]\nfollow_imports = skip\n")
    examples = [text for page in PAGES for _, text in blocks(page, "python")]
    names = {f"good_{i}.py": text for i, text in enumerate([*examples, TYPED])}
    names |= {f"wrong_{i}.py": f"import resm_kernels\n{line}\n" for i, line in enumerate(WRONG)}
    for name, text in names.items():
        (tmp_path / name).write_text(text)
    command = [sys.executable, "-m", "mypy", "--strict", "--python-executable"]
    found = subprocess.run(
        [*command, site / "bin" / "python", *names], cwd=tmp_path, capture_output=True, text=True
    ).stdout
    assert "good_" not in found, found
    for number, said in enumerate(WRONG.values()):
        lines = [line for line in found.splitlines() if line.startswith(f"wrong_{number}.py")]
        assert len(lines) >= 1, found
        assert said in lines[0], found
