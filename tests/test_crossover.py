"""The crossover table: how it is read, what it chooses, what measurements make of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.gpu.crossover import WORTH, propose, with_table
from resm_kernels.api import merge_tensors
from resm_kernels.doctor import measured
from resm_kernels.errors import NumericsError, ResmError
from resm_kernels.linalg import (
    Solver,
    SolverOptions,
    SpectralMerge,
    cusolver,
    dispatch,
    leading_subspaces,
    leading_subspaces_batch,
    spectral_merge_batch,
)
from resm_kernels.linalg.crossover import (
    BACKENDS,
    Operation,
    Problem,
    Rule,
    Table,
    choose,
    committed_tables,
    committed_text,
    parse_tables,
    table_for,
)
from resm_kernels.linalg.solver import Mode
from resm_kernels.methods import out_of_memory
from tests import oracle
from tests.fake_cusolver import Fake

EVERY = frozenset(cusolver.SOLVERS)
(GENERAL,) = (table for table in committed_tables() if table.card is None)


def eigh(n: int, batch: int = 1, dtype: str = "float64") -> Problem:
    return Problem("eigh", (n, n), dtype, batch)


# The committed table


def test_nothing_is_asked_for_that_was_not_measured_or_published() -> None:
    assert not GENERAL.measured
    assert all(rule.backend in ("torch", "loop", "syev_batched") for rule in GENERAL.rules)
    for version, operation, batch, n in (
        (version, operation, batch, n)
        for version in ("2.6.0", "2.11.0+cu130", "2.13.0")
        for operation in BACKENDS
        for batch in (1, 2, 512)
        for n in (1, 32, 33, 128, 129, 8192)
    ):
        problem = Problem(operation, (n, n), "float64", batch, max(1, n // 3))
        assert choose(GENERAL, problem, (), version) in ("torch", "loop")
        if batch == 1 or operation != "eigh":
            assert choose(GENERAL, problem, EVERY, version) == "torch"


@pytest.mark.parametrize(
    ("n", "batch", "usable", "version", "expected"),
    [
        (100, 48, EVERY, "2.11.0+cu130", "syev_batched"),
        (100, 48, (), "2.11.0+cu130", "loop"),
        (100, 48, EVERY, "2.12.0", "torch"),
        (32, 2, EVERY, "2.6", "torch"),
        (33, 2, EVERY, "2.9.1", "syev_batched"),
        (129, 2, EVERY, "2.11.0", "loop"),
        (129, 2, EVERY, "2.13.0", "loop"),
        (100, 1, EVERY, "2.11.0", "torch"),
    ],
)
def test_published_timings_decide_about_small_batches(
    n: int, batch: int, usable: Sequence[str], version: str, expected: str
) -> None:
    assert choose(GENERAL, eigh(n, batch), usable, version) == expected


# The choice


def test_the_first_rule_that_holds_and_can_be_used_decides() -> None:
    rules = (
        Rule("eigh", "syevd", {"n": (100, 200)}, dtype="float64"),
        Rule("eigh", "syev_batched", {"batch": (2, None), "n": (None, 200)}),
        Rule("leading", "syevdx", {"share": (0, 0.34)}, torch=((2, 11), (2, 12))),
        Rule("svd", "gesvdp", {"aspect": (2, None)}),
        Rule("eigh", "loop", {"batch": (2, None)}),
    )
    table = Table("card", True, "", rules)

    def chosen(
        problem: Problem, usable: Sequence[str] = tuple(EVERY), version: str = "2.11"
    ) -> str:
        return choose(table, problem, usable, version)

    assert chosen(eigh(100, 8)) == chosen(eigh(200)) == "syevd"
    assert chosen(eigh(150, 8), ["syev_batched"]) == "syev_batched"
    assert chosen(eigh(150, 8), []) == "loop"
    assert chosen(eigh(150), []) == "torch"
    assert chosen(eigh(100, 8, "float32")) == chosen(eigh(99, 8)) == "syev_batched"
    assert chosen(eigh(201, 8)) == "loop"
    third, half = (Problem("leading", (300, 300), "float64", count=c) for c in (100, 150))
    assert chosen(third) == chosen(third, version="2.11.9+cu128") == "syevdx"
    assert chosen(half) == chosen(third, version="2.12.0") == "torch"
    assert chosen(third, version="2.10.1") == "torch"
    assert chosen(Problem("svd", (200, 100), "float32")) == "gesvdp"
    assert chosen(Problem("svd", (100, 200), "float32")) == "gesvdp"
    assert chosen(Problem("svd", (199, 100), "float32")) == "torch"


def test_a_card_adds_its_own_rules_before_the_general_ones() -> None:
    own = Table("H100", True, "", (Rule("eigh", "syevd"),))
    both = table_for([GENERAL, own], "H100")
    assert (both.card, both.measured) == ("H100", True)
    assert both.rules == (*own.rules, *GENERAL.rules)
    assert table_for([GENERAL, own], "A100") == GENERAL


def test_the_doctor_says_whether_the_table_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert measured([]) == measured(["H100"]) == "not yet measured on this card"
    own = Table("H100", True, "", (), {"torch": "2.11.0"}, "abc")
    monkeypatch.setattr("resm_kernels.doctor.committed_tables", lambda: (GENERAL, own))
    assert measured(["H100"]) == "measured on this card with torch 2.11.0 at abc"
    assert measured(["H100", "A100"]) == "not yet measured on this card"


# The file


def changed(**values: Any) -> str:
    """The committed file with entries of its first table replaced."""
    content = json.loads(committed_text())
    content["tables"][0] |= values
    return json.dumps(content)


def one_rule(**values: Any) -> str:
    return changed(rules=[{"operation": "eigh", "backend": "torch", **values}])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("[]", "schema is not 1"),
        ('{"schema": 2}', "schema is not 1"),
        ('{"schema": 1}', "no table for all cards"),
        ('{"schema": 1, "tables": [3]}', "tables[0] is 3, not a dict"),
        (changed(card="H100"), "no table for all cards"),
        (changed(card=7), "tables[0].card is 7, not a str"),
        (changed(measured="yes"), "tables[0].measured is 'yes', not a bool"),
        (changed(rules=None), "tables[0].rules is None, not a list"),
        (changed(versions=[]), "tables[0].versions is [], not a dict"),
        (changed(rules=[[]]), "tables[0].rules[0] is [], not a dict"),
        (one_rule(operation="qr"), "operation is 'qr', not one of eigh, leading, svd"),
        (one_rule(operation=[]), "operation is [], not one of"),
        (one_rule(backend="gesvdp"), "backend is 'gesvdp', not one of torch, loop, syev_batched"),
        (one_rule(backend=[]), "backend is [], not one of"),
        (one_rule(dtype="bfloat16"), "dtype is 'bfloat16', not one of float32, float64"),
        (one_rule(n=[2]), "rules[0].n is [2], not two numbers or nulls in order"),
        (one_rule(n=[3, 2]), "rules[0].n is [3, 2], not two"),
        (one_rule(n=[True, 2]), "rules[0].n is [True, 2], not two"),
        (one_rule(batch="all"), "rules[0].batch is 'all', not two"),
        (one_rule(torch=[2.1, None]), "rules[0].torch is [2.1, None], not two versions"),
        (one_rule(sise=[1, 2]), "rules[0].sise is unknown"),
    ],
)  # fmt: skip
def test_a_malformed_table_is_one_clear_error(text: str, said: str) -> None:
    with pytest.raises(ResmError) as error:
        parse_tables(text, "tables.json")
    assert error.value.what == "tables.json is no crossover table"
    assert said in (error.value.got or "")
    assert "install resm-kernels again" in str(error.value)


def test_every_mistake_is_named_at_once() -> None:
    content = json.loads(one_rule(operation="qr", n=[2], sise=1))
    content["tables"] *= 2
    with pytest.raises(ResmError) as error:
        parse_tables(json.dumps(content), "tables.json")
    got = error.value.got or ""
    assert got.count("operation is 'qr'") == got.count("sise is unknown") == 2
    assert "2 tables for None" in got


def test_unknown_cards_and_keys_of_a_table_are_read() -> None:
    tables = parse_tables(committed_text(), "")
    assert tables == committed_tables()
    (only,) = parse_tables(changed(versions={"torch": "2.13"}, commit="abc", later=1), "")
    assert only == replace(tables[0], versions={"torch": "2.13"}, commit="abc")


# What measurements make of it

ABOUT = {
    "machine": {"gpu": "H100"},
    "versions": {"torch": "2.11.0+cu130", "python": "3.12"},
    "commit": "abc",
}


def row(
    operation: Operation, name: str, seconds: float, n: int, batch: int = 1, **more: Any
) -> dict[str, Any]:
    labels = {"part": operation, "name": name, "batch": batch, "shape": (n, n), "status": "ok"}
    return {**labels, "dtype": "float64", "seconds": seconds, **more}


def proposed(rows: Sequence[dict[str, Any]]) -> Callable[..., str]:
    """What the table of these rows chooses, once it is in the committed file."""
    text = with_table(committed_text(), propose(rows, ABOUT))
    table = table_for(parse_tables(text, "proposal"), "H100")
    assert table.measured
    assert table.commit == "abc"
    return lambda problem, version="2.11.2": choose(table, problem, EVERY, version)


def test_the_fastest_of_every_cell_is_proposed_for_the_sizes_around_it() -> None:
    rows = []
    for batch, n, torch_, loop, ours in (
        (8, 64, 3.0, 2.0, 1.0), (8, 256, 3.0, 2.0, 1.5), (8, 1024, 2.0, 3.0, 4.0),
        (64, 64, 1.0, 2.0, 3.0), (64, 256, 3.0, 2.0, 2.5),
    ):  # fmt: skip
        found = {"torch": torch_, "loop": loop, "syev_batched": ours}
        rows += [row("eigh", name, seconds, n, batch) for name, seconds in found.items()]
    chosen = proposed(rows)
    assert [chosen(eigh(n, 8)) for n in (1, 64, 65, 256)] == ["syev_batched"] * 4
    assert chosen(eigh(200, 63)) == "syev_batched"
    assert chosen(eigh(257, 8)) == chosen(eigh(1024, 63)) == "torch"
    assert chosen(eigh(64, 64)) == chosen(eigh(64, 5000)) == "torch"
    assert chosen(eigh(65, 64)) == chosen(eigh(256, 999)) == "loop"
    # Past the grid, below it and under another torch the general rules hold.
    assert chosen(eigh(1025, 8)) == chosen(eigh(300, 64)) == chosen(eigh(300, 7)) == "loop"
    assert chosen(eigh(200, 8), "2.12.0") == "loop"
    assert chosen(eigh(200, 8, "float32")) == "loop"


def test_a_solver_that_is_wrong_or_hardly_faster_is_not_proposed() -> None:
    rows = [
        row("leading", "torch", 1.0, 512), row("leading", "syevdx", 0.99 / WORTH, 512),
        row("leading", "torch", 1.0, 1024), row("leading", "syevdx", 1.01 / WORTH, 1024),
        row("leading", "torch", 1.0, 2048), row("leading", "syevdx", 0.1, 2048, status="fail"),
        {"part": "leading", "name": "syevdx", "status": "skipped", "batch": 1, "shape": (4096,) * 2,
         "dtype": "float64"},
        row("leading", "syevdx", 0.1, 8192),
    ]  # fmt: skip
    chosen = proposed(rows)

    def problem(n: int, count: int) -> Problem:
        return Problem("leading", (n, n), "float64", count=count)

    assert chosen(problem(512, 170)) == chosen(problem(7, 2)) == "syevdx"
    for n in (513, 1024, 2048, 4096, 8192, 9000):
        assert chosen(problem(n, n // 3)) == "torch"
    assert chosen(problem(512, 256)) == "torch"


def test_tall_and_square_matrices_have_rules_of_their_own() -> None:
    rows = [
        row("svd", "torch", 2.0, 512), row("svd", "gesvdp", 3.0, 512),
        row("svd", "torch", 2.0, 512, shape=(2048, 512)),
        row("svd", "gesvdp", 1.0, 512, shape=(2048, 512)),
        row("svd", "torch gesvd", 0.1, 512),
    ]  # fmt: skip
    chosen = proposed(rows)
    assert chosen(Problem("svd", (500, 500), "float64")) == "torch"
    assert chosen(Problem("svd", (500, 2000), "float64")) == "gesvdp"


def test_a_card_measured_again_replaces_its_table() -> None:
    table = propose([row("eigh", "torch", 1.0, 64, 8)], ABOUT)
    once = with_table(committed_text(), table)
    assert with_table(once, table) == once
    assert len(parse_tables(once, "")) == 1 + len(committed_tables())
    (general,) = (t for t in json.loads(committed_text())["tables"] if t["card"] is None)
    assert with_table(committed_text(), general) == committed_text()


# The dispatcher, with a cuSOLVER that computes on the host


@pytest.fixture
def ask_for(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return lambda name: monkeypatch.setattr(dispatch, "backend", lambda *given: name)


def gram_matrices(*shape: int) -> torch.Tensor:
    noise = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return noise.mT @ noise


def assert_decomposes(matrices: torch.Tensor, found: dispatch.Pair | dispatch.Eigh) -> None:
    values, vectors = found[:2]
    expected = torch.linalg.eigvalsh(matrices)[..., -values.shape[-1] :]
    assert torch.allclose(values, expected, rtol=0, atol=1e-12 * float(expected.abs().max()))
    assert torch.allclose(matrices @ vectors, vectors * values[..., None, :], atol=1e-10)


def test_on_a_cpu_torch_does_everything(fake_cusolver: Fake) -> None:
    matrix = gram_matrices(40, 40)
    assert dispatch.backend(eigh(100, 48), torch.device("cpu")) == "torch"
    assert dispatch.identity(torch.device("cpu")) is None
    assert_decomposes(matrix, dispatch.eigh(matrix))
    assert dispatch.leading_eigh(matrix, 10) is None
    assert fake_cusolver.count("cusolver") == 0


def test_on_a_gpu_the_table_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "card", lambda device: "a card")
    monkeypatch.setattr(dispatch, "usable_solvers", lambda: EVERY)
    monkeypatch.setattr(torch, "__version__", "2.11.0")
    device = torch.device("cuda")
    assert dispatch.backend(eigh(100, 48), device) == "syev_batched"
    found = dispatch.identity(device)
    assert found is not None
    assert found["card"] == "a card"
    assert found["solvers"] == sorted(EVERY)
    json.dumps(found)


@pytest.mark.parametrize(
    ("name", "shape", "called"),
    [
        ("torch", (3, 12, 12), ""),
        ("loop", (3, 12, 12), ""),
        ("syev_batched", (2, 3, 12, 12), "XsyevBatched"),
        ("syev_batched", (12, 12), "XsyevBatched"),
        ("syevd", (12, 12), "Xsyevd"),
        ("syevd", (2, 12, 12), ""),
    ],
)
def test_eigenpairs_by_every_backend(
    ask_for: Callable[[str], None], fake_cusolver: Fake,
    name: str, shape: tuple[int, ...], called: str,
) -> None:  # fmt: skip
    ask_for(name)
    matrices = gram_matrices(*shape)
    kept = matrices.clone()
    assert_decomposes(matrices, dispatch.eigh(matrices))
    assert torch.equal(matrices, kept)
    assert bool(fake_cusolver.count("cusolver")) == bool(called)
    assert not called or fake_cusolver.count(called)
    strided = matrices.repeat_interleave(2, dim=-1)[..., ::2]
    assert_decomposes(matrices, dispatch.eigh(strided))


def test_the_leading_part_of_a_spectrum_by_cusolver(
    ask_for: Callable[[str], None], fake_cusolver: Fake
) -> None:
    ask_for("syevdx")
    matrix = gram_matrices(50, 40)
    kept = matrix.clone()
    found = dispatch.leading_eigh(matrix, 13)
    assert found is not None
    assert_decomposes(matrix, found)
    assert torch.equal(matrix, kept)
    assert fake_cusolver.count("Xsyevdx")
    assert dispatch.leading_eigh(matrix, 0) is None


@pytest.mark.parametrize("shape", [(30, 20), (20, 30)])
def test_singular_values_by_cusolver(
    ask_for: Callable[[str], None], fake_cusolver: Fake, shape: tuple[int, int]
) -> None:
    ask_for("gesvdp")
    matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    left, values, right, _ = dispatch.svd(matrix)
    assert torch.allclose(left * values @ right, matrix, atol=1e-12)
    assert fake_cusolver.count("Xgesvdp")
    delta = oracle.make_delta("steep", 80, 60, np.random.default_rng(0))
    subspace = leading_subspaces(torch.from_numpy(delta), 20)
    assert subspace.backend == "svd"
    expected = np.linalg.svd(delta.astype(np.float64), compute_uv=False)[:20]
    assert np.allclose(subspace.values.numpy(), expected, rtol=1e-6)


def test_singular_values_that_cusolver_moved_are_not_taken(
    ask_for: Callable[[str], None], fake_cusolver: Fake
) -> None:
    ask_for("gesvdp")
    fake_cusolver.report_size("cusolverDnXgesvdp", 10**9)
    matrix = torch.diag(torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64))
    exact = torch.linalg.svd(matrix, full_matrices=False)
    for found, expected in zip(dispatch.svd(matrix)[:3], exact, strict=True):
        assert torch.equal(found, expected)
    assert fake_cusolver.count("Xgesvdp")


FUNCTIONS = {
    "syevd": "cusolverDnXsyevd",
    "syev_batched": "cusolverDnXsyevBatched",
    "syevdx": "cusolverDnXsyevdx",
    "gesvdp": "cusolverDnXgesvdp",
}


@pytest.mark.parametrize("mode", ["exact", "auto"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_solver_that_fails_is_left_for_torch_and_named(
    ask_for: Callable[[str], None], fake_cusolver: Fake, name: str, mode: Mode
) -> None:
    rng = np.random.default_rng(0)
    found = [oracle.make_delta("steep" if name == "gesvdp" else "power", 300, 270, rng)]
    deltas = [torch.from_numpy(delta) for delta in found * 3]

    def merge(backend: str) -> SpectralMerge:
        ask_for(backend)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("resm_kernels.linalg.eigen.PARTIAL_SIZE", 1000)
            return Solver(SolverOptions(mode=mode)).merge(deltas, [90] * 3)

    expected = merge("torch")
    fake_cusolver.report_status(FUNCTIONS[name], 7)
    left = merge(name)
    why = f"{name}: {FUNCTIONS[name]}: CUSOLVER_STATUS_INTERNAL_ERROR"
    assert any(why in reason for reason in left.fallbacks)
    assert not any(why in reason for reason in expected.fallbacks)
    assert torch.equal(left.left, expected.left)
    assert torch.equal(left.right, expected.right)


def test_a_batch_that_fails_is_left_for_torch_and_named(
    ask_for: Callable[[str], None], fake_cusolver: Fake
) -> None:
    deltas = torch.randn(4, 3, 24, 18, generator=torch.Generator().manual_seed(0))

    def merge(backend: str) -> list[SpectralMerge | None]:
        ask_for(backend)
        batch = leading_subspaces_batch(deltas, torch.full((4, 3), 6))
        assert {s.fallback for s in batch.subspaces(0)} == {batch.fallback}
        across = leading_subspaces_batch(deltas.mT, torch.full((4, 3), 6))
        assert across.fallback == batch.fallback
        return spectral_merge_batch(batch, torch.ones(4, 3, dtype=torch.float64))

    expected = merge("torch")
    fake_cusolver.report_info(2, 5)
    found = merge("syev_batched")
    for ours, theirs in zip(found, expected, strict=True):
        assert ours is not None
        assert theirs is not None
        assert ours.fallbacks[0].startswith("syev_batched: entry 2: info = 5")
        assert not theirs.fallbacks
        assert torch.equal(ours.left, theirs.left)


@pytest.mark.parametrize("function", ["cusolverDnCreate", *FUNCTIONS.values()])
def test_a_solver_that_runs_out_of_memory_is_not_left(
    ask_for: Callable[[str], None], fake_cusolver: Fake, function: str
) -> None:
    """Another route would give other bytes: the engine gives memory back and tries again."""
    name = next((n for n, f in FUNCTIONS.items() if f == function), "syevd")
    ask_for(name)
    fake_cusolver.report_status(function, 2)
    kind = "steep" if name == "gesvdp" else "power"
    delta = torch.from_numpy(oracle.make_delta(kind, 80, 60, np.random.default_rng(0)))

    def work() -> None:
        with pytest.raises(torch.OutOfMemoryError, match="CUSOLVER_STATUS_ALLOC_FAILED"):
            leading_subspaces(delta, 20)
        with pytest.raises(NumericsError, match=r"tensor 'here' .* is out of memory") as error:
            merge_tensors(torch.zeros_like(delta), [delta] * 2, "tsvm", name="here")
        assert out_of_memory(error.value)

    with ThreadPoolExecutor(1) as pool:  # a new thread makes a new handle
        pool.submit(work).result()


@pytest.mark.parametrize("kind", ["power", "noise", "lora"])
def test_merges_by_the_leading_part_alone(
    ask_for: Callable[[str], None], fake_cusolver: Fake, kind: str
) -> None:
    ask_for("syevdx")
    rng = np.random.default_rng(0)
    found = [oracle.make_delta(kind, 90, 72, rng) for _ in range(3)]
    merge = Solver(SolverOptions(mode="exact")).merge(
        [torch.from_numpy(d) for d in found], [24] * 3
    )
    assert merge.backends[0] == "gram-syevdx"
    assert not merge.fallbacks
    reference = oracle.tsvm(found, [24] * 3)
    assert oracle.error((merge.left @ merge.right.T).numpy(), reference) <= 1e-6
    assert fake_cusolver.count("Xsyevdx")


def test_a_solver_that_does_not_converge_is_left_and_named(
    ask_for: Callable[[str], None], fake_cusolver: Fake
) -> None:
    ask_for("syevdx")
    fake_cusolver.report_info(0, 3)
    delta = torch.randn(50, 40, generator=torch.Generator().manual_seed(0))
    found = leading_subspaces(delta, 10)
    assert found.backend == "gram-full"
    assert found.fallback == "syevdx: entry 0: info = 3"
    assert torch.allclose(found.values, torch.linalg.svdvals(delta.double())[:10])
