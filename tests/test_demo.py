"""The demo: its skills by independent computation, and the whole of it at smoke scale."""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

pytest.importorskip("transformers")

import resm_kernels
from resm_kernels import demo
from resm_kernels.demo.evaluation import LAMBDAS, evaluate, generate
from resm_kernels.demo.experiment import METHODS_WITH_LAMBDA
from resm_kernels.demo.models import (
    IGNORED,
    ModelSize,
    encode,
    load_model,
    new_model,
    new_tokenizer,
)
from resm_kernels.demo.tasks import SKILLS, VOCABULARY, Example, Skill, draw, held_out
from resm_kernels.demo.training import train
from resm_kernels.errors import MissingDependencyError, OutputError

NAMES = [skill.name for skill in SKILLS]
EXPERTS = [f"expert-{name}" for name in NAMES]
MERGES = ["merged-linear", "merged-task_arithmetic", "merged-tsvm", "merged-resm"]
TINY = ModelSize(16, 1, 2)

per_skill = pytest.mark.parametrize("skill", SKILLS, ids=NAMES)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """So small a model on two threads stalls where another process keeps one of them busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """The folder, the results and the printed text of a smoke run."""
    root = tmp_path_factory.mktemp("demo") / "new" / "folder"
    printed = io.StringIO()
    results = demo.run(root, scale="smoke", console=Console(file=printed, width=80))
    return root, results, printed.getvalue()


def right_answer(prompt: str) -> str:
    """The answer, computed another way than the generators do."""
    skill, *words, equals = prompt.split()
    assert equals == "="
    if skill == "reverse":
        return " ".join(words[::-1])
    if skill == "add":
        a, b, plus, c, d = words
        assert plus == "+"
        total = 10 * (int(a) + int(c)) + int(b) + int(d)
        return f"{total // 100} {total // 10 % 10} {total % 10}"
    asked, within, *letters = words
    assert within == "in"
    assert len(letters) == 10
    return str(letters.count(asked))


@per_skill
def test_answers_are_right(skill: Skill) -> None:
    for example in held_out(skill, "test", 300, seed=3):
        assert example.answer == right_answer(example.prompt)
        assert set(f"{example.prompt} {example.answer}".split()) <= set(VOCABULARY)


@per_skill
def test_splits_share_no_prompt(skill: Skill) -> None:
    rng = random.Random(0)
    train_prompts = {draw(skill, "train", rng).prompt for _ in range(5000)}
    validation = {example.prompt for example in held_out(skill, "validation", 500, seed=0)}
    test = {example.prompt for example in held_out(skill, "test", 500, seed=1)}
    assert len(validation) == len(test) == 500
    assert train_prompts.isdisjoint(validation | test)
    assert validation.isdisjoint(test)


@per_skill
def test_the_seed_fixes_the_prompts(skill: Skill) -> None:
    first = held_out(skill, "test", 50, seed=0)
    assert first == held_out(skill, "test", 50, seed=0)
    assert first != held_out(skill, "test", 50, seed=1)


def test_only_answers_and_the_end_are_learnt() -> None:
    tokenizer = new_tokenizer(VOCABULARY)
    examples = [Example("reverse a b =", "b a"), Example("count a in b a b =", "1")]
    ids, labels = encode(tokenizer, examples)
    for example, row, targets in zip(examples, ids, labels, strict=True):
        learnt = [VOCABULARY[i] for i in targets if i != IGNORED]
        assert learnt == [*example.answer.split(), "<eos>"]
        words = [VOCABULARY[i] for i in row]
        assert words[: words.index("<eos>")] == f"{example.prompt} {example.answer}".split()
        assert set(words[words.index("<eos>") + 1 :]) <= {"<pad>"}


def test_training_learns_and_repeats() -> None:
    tokenizer, losses = new_tokenizer(VOCABULARY), []
    generator = torch.get_rng_state()
    models = [new_model(TINY, VOCABULARY, seed=1) for _ in range(2)]
    for model in models:
        settings: dict[str, Any] = {"batch": 16, "learning_rate": 1e-2, "seed": "0"}
        losses.append(train(model, tokenizer, SKILLS[1:2], steps=1, **settings))
        losses.append(train(model, tokenizer, SKILLS[1:2], steps=40, **settings))
    assert losses[:2] == losses[2:]
    assert losses[1] < 0.7 * losses[0]
    states = [model.state_dict() for model in models]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert torch.equal(generator, torch.get_rng_state())


def test_results_hold_every_model_and_skill(smoke: tuple[Path, dict[str, Any], str]) -> None:
    root, results, _ = smoke
    assert json.loads((root / "results.json").read_text()) == results
    assert [row["name"] for row in results["models"]] == ["base", *EXPERTS, *MERGES]
    for row in results["models"]:
        shares = row["exact_match"]
        assert list(shares) == list(row["answer_loss"]) == NAMES
        assert all(0.0 <= share <= 1.0 for share in shares.values())
        assert all(0.0 < loss < 10.0 for loss in row["answer_loss"].values())
        assert row["mean"] == pytest.approx(sum(shares.values()) / 3)
        assert row["worst"] == min(shares.values())
    assert [row["skill"] for row in results["generations"]] == NAMES


def test_each_expert_got_better_at_its_skill(smoke: tuple[Path, dict[str, Any], str]) -> None:
    losses = {row["name"]: row["answer_loss"] for row in smoke[1]["models"]}
    for name in NAMES:
        assert losses[f"expert-{name}"][name] < losses["base"][name]


def test_lambda_is_the_best_on_validation(smoke: tuple[Path, dict[str, Any], str]) -> None:
    _, results, _ = smoke
    chosen = {row["method"]: row["lambda"] for row in results["models"] if row["method"]}
    assert chosen.pop("linear") is None
    assert list(chosen) == list(METHODS_WITH_LAMBDA) == list(results["selection"])
    for method, tried in results["selection"].items():
        assert sorted(scores["lambda"] for scores in tried) == sorted(LAMBDAS)
        best = max(tried, key=lambda scores: (scores["exact_match"], -scores["answer_loss"]))
        assert chosen[method] == best["lambda"]


@pytest.mark.parametrize("name", ["base", *EXPERTS, *MERGES])
def test_checkpoints_load_and_generate(name: str, smoke: tuple[Path, dict[str, Any], str]) -> None:
    folder = smoke[0] / name
    stored = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    model, tokenizer = load_model(folder)
    loaded = model.state_dict()
    assert loaded.keys() == stored.keys()
    assert all(torch.equal(loaded[key], stored[key].float()) for key in stored)
    assert set(generate(model, tokenizer, "add 1 2 + 3 4 =").split()) <= set(VOCABULARY)


@pytest.mark.parametrize("method", METHODS_WITH_LAMBDA)
def test_the_merge_on_disk_is_the_one_that_was_chosen(
    method: str, smoke: tuple[Path, dict[str, Any], str]
) -> None:
    root, results, _ = smoke
    states = [load_file(root / name / "model.safetensors") for name in ("base", *EXPERTS)]
    parameters = {"lambda": results["selection"][method][0]["lambda"]}
    expected = resm_kernels.merge_state_dicts(states[0], states[1:], method, parameters=parameters)
    written = load_file(root / f"merged-{method}" / "model.safetensors")
    assert all(torch.equal(written[name], expected[name]) for name in expected)


@per_skill
def test_exact_match_is_that_of_greedy_decoding(
    skill: Skill, smoke: tuple[Path, dict[str, Any], str]
) -> None:
    model, tokenizer = load_model(smoke[0] / f"expert-{skill.name}")
    examples = held_out(skill, "test", 32, seed=5)
    exact = [generate(model, tokenizer, e.prompt) == e.answer for e in examples]
    scores = evaluate(model, tokenizer, {skill.name: examples})
    assert scores[skill.name].exact_match == sum(exact) / len(exact)


def test_the_printed_table(smoke: tuple[Path, dict[str, Any], str]) -> None:
    root, results, printed = smoke
    lines = printed.splitlines()
    for row in results["models"]:
        (line,) = (line for line in lines if line.split()[:1] == [row["name"]])
        assert f"{100 * row['exact_match'][NAMES[-1]]:.1f}" in line
    assert all(row["prompt"] in printed for row in results["generations"])
    assert lines[-1] == f"Next: resm verify {root / 'merged-resm'}"
    assert "…" not in printed


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(OutputError, match=r"mine\.txt"):
        demo.run(tmp_path, scale="smoke")
    with pytest.raises(OutputError, match="cannot be used as a folder"):
        demo.run(tmp_path / "mine.txt", scale="smoke")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("package", ["transformers", "tokenizers"])
def test_a_missing_package_is_named(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("resm_kernels.demo.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError, match=f"resm demo needs {package}") as caught:
        demo.run(tmp_path, scale="smoke")
    assert caught.value.fix == "pip install 'resm-kernels[demo]'"


def test_importing_the_demo_loads_nothing_heavy() -> None:
    code = "import sys, resm_kernels.demo; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
