"""The element-wise methods against NumPy in float64; degenerate weights, draws, memory, sharing."""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

import resm_kernels
from resm_kernels.errors import ResmError, UsageError
from resm_kernels.linalg.subspace import FactoredDelta
from resm_kernels.methods import METHODS, Inputs, averaging, merge_weight, sparsifying
from resm_kernels.ops.mask import drop_key
from tests.checkpoints import save_family

Array = NDArray[np.float64]
EPS = 2.0**-24
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
SHAPES = [(1,), (33,), (1, 40), (40, 1), (30, 41), (3, 5, 7)]
WEIGHTS = (0.7, -0.4, 1.1)
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "ties": ("ties", {"density": [0.5, 0.3, 0.8]}),
    "ties, a sum, rescaled": (
        "ties",
        {"density": [0.0, 1.0, 0.01], "normalize": False, "rescale": True, "lambda": 0.6},
    ),
    "breadcrumbs": ("breadcrumbs", {"density": [0.5, 0.9, 1.0], "gamma": [0.1, 0.2, 0.3]}),
    "breadcrumbs, rescaled": (
        "breadcrumbs",
        {"density": [0.0, 0.4, -1.0], "gamma": 0.25, "rescale": True, "normalize": True},
    ),
    "breadcrumbs_ties": ("breadcrumbs_ties", {"density": 0.5, "gamma": [0.0, 1.0, 0.2]}),
    "dare_linear": ("dare_linear", {"density": [0.5, 0.3, 1.0], "seed": 3, "normalize": True}),
    "dare_linear, as drawn": ("dare_linear", {"density": 0.5, "rescale": False}),
    "dare_ties": ("dare_ties", {"density": [0.5, 0.0, 0.8], "lambda": 1.5}),
    "della_linear": ("della_linear", {"density": [0.5, 1.0, 0.2], "epsilon": [0.3, 9.0, 0.0]}),
    "della": ("della", {"density": [0.5, 0.0, 0.8], "epsilon": 0.1, "seed": 2**32 - 1}),
}


def weights_of(shape: Sequence[int], dtype: torch.dtype, count: int = 3) -> list[torch.Tensor]:
    """A base and experts, with equal magnitudes and unchanged entries."""
    generator = torch.Generator().manual_seed(0)
    base = 0.1 * torch.randn(*shape, generator=generator)
    changes = [0.01 * torch.randn(*shape, generator=generator) ** 3 for _ in range(count)]
    for change in changes:
        change[torch.rand(*shape, generator=generator) < 0.1] = 0.0
    return [base.to(dtype), *((base + change).to(dtype) for change in changes)]


def deltas_of(base: torch.Tensor, experts: Sequence[torch.Tensor]) -> list[Array]:
    """Deltas as they are taken: in float32, or float64 for float64 weights."""
    wide = torch.float64 if base.dtype == torch.float64 else torch.float32
    return [(e.to(wide) - base.to(wide)).double().numpy() for e in experts]


def numbers(seed: int, t: int, count: int) -> NDArray[np.uint32]:
    key = drop_key(seed, "weight", t)
    halves = np.array([key % 2**64, key >> 64], dtype=np.uint64)
    return np.random.Philox(key=halves).random_raw(count // 2 + 4).view(np.uint32)[:count]


def kept(method: str, delta: Array, t: int, given: dict[str, Any]) -> NDArray[np.bool_]:
    """Which entries of a delta survive, from sorts."""
    density, count = given["density"][t], delta.size
    if density >= 1.0:
        return np.ones(delta.shape, dtype=bool)
    falling = np.argsort(-np.abs(delta).ravel(), kind="stable")
    flat = np.zeros(count, dtype=bool)
    if density <= 0.0:
        return flat.reshape(delta.shape)
    if method == "ties":
        flat[falling[: max(1, int(density * count))]] = True
    elif method.startswith("breadcrumbs"):
        wanted = int(density * count)
        top = min(int(given["gamma"][t] * count), count - wanted)
        flat[falling[top : top + wanted]] = True
    else:
        share: Array | float = density
        if method.startswith("della"):
            rows = np.abs(delta).reshape(-1, delta.shape[-1] if delta.ndim > 1 else count)
            ranks = rows.argsort(-1, kind="stable").argsort(-1, kind="stable").ravel()
            middle = (rows.shape[1] - 1) / 2
            rising = ranks / middle - 1 if middle else np.zeros(count)
            share = density + rising * given["epsilon"][t]
        flat = numbers(given["seed"], t, count) < share * 2.0**32
    return flat.reshape(delta.shape)


def oracle(
    method: str, base: torch.Tensor, experts: Sequence[torch.Tensor], given: dict[str, Any]
) -> tuple[Array, Array, NDArray[np.bool_]]:
    """The merge in float64, the size of what is added up, and where no sign hangs on rounding."""
    terms = []
    for t, delta in enumerate(deltas_of(base, experts)):
        masked = np.where(kept(method, delta, t, given), delta, 0.0)
        before, after = np.abs(delta).sum(), np.abs(masked).sum()
        if given["rescale"] and min(before, after) >= 1e-7:
            masked = masked * (before / after)
        terms.append(WEIGHTS[t] * masked)
    stacked, origin = np.stack(terms), base.double().numpy()
    shares = np.array(WEIGHTS[: len(terms)]).reshape(-1, *[1] * origin.ndim)
    size, clear = np.abs(stacked).sum(0), np.ones(origin.shape, dtype=bool)
    if method in ("ties", "dare_ties", "della", "breadcrumbs_ties"):
        vote = stacked.sum(0)
        agrees = np.where(vote >= 0, stacked > 0, stacked < 0)
        total, weight = (stacked * agrees).sum(0), (shares * agrees).sum(0)
        clear = (np.abs(vote) > 8 * EPS * size) | (size == 0)
    else:
        total, weight = stacked.sum(0), np.full(origin.shape, shares.sum())
    if given["normalize"]:
        weight = np.where(np.abs(weight) < 1e-8, 1.0, weight)
        total, size = total / weight, size / np.abs(weight)
    scale = given["lambda"]
    return origin + scale * total, np.abs(origin) + abs(scale) * size, clear


def complete(method: str, parameters: dict[str, Any], experts: int) -> dict[str, Any]:
    """The parameters with the method's defaults, one of a kind per expert."""
    options = METHODS[method].make_options(parameters, experts)
    return {name.rstrip("_"): value for name, value in vars(options).items()}


def merge(
    method: str, base: torch.Tensor, experts: Sequence[torch.Tensor], **given: Any
) -> torch.Tensor:
    given = {"name": "weight", "out_dtype": torch.float32, **given}
    return resm_kernels.merge_tensors(base, experts, method, **given)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("setting", SETTINGS)
def test_sparsified_merges_against_the_oracle(setting: str, dtype: torch.dtype) -> None:
    method, parameters = SETTINGS[setting]
    for shape in SHAPES:
        base, *experts = weights_of(shape, dtype)
        given = complete(method, parameters, 3)
        expected, size, clear = oracle(method, base, experts, given)
        found = merge(method, base, experts, weights=WEIGHTS, parameters=parameters)
        off = np.abs(found.double().numpy() - expected)
        assert clear.mean() > 0.99
        assert (off <= 16 * EPS * size)[clear].all(), (shape, (off / size)[clear].max() / EPS)


def model_stock(base: torch.Tensor, experts: Sequence[torch.Tensor], columns: int) -> Array:
    wide = [tensor.double().numpy().reshape(-1, columns) for tensor in (base, *experts)]
    deltas = [tensor - wide[0] for tensor in wide[1:]]
    cosines = [
        (a * b).sum(-1) / np.maximum(np.sqrt((a * a).sum(-1) * (b * b).sum(-1)), 1e-6)
        for a, b in itertools.combinations(deltas, 2)
    ]
    cosine = np.clip(cosines, -1, 1).mean(0)
    below = 1 + (len(deltas) - 1) * cosine
    ratio = np.where(np.abs(below) < 1e-6, 0.0, len(deltas) * cosine / np.where(below, below, 1.0))
    return (wide[0] + ratio[:, None] * np.mean(deltas, 0)).reshape(base.shape)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 70_000), (70_000, 2)])
def test_model_stock_against_the_oracle(
    shape: tuple[int, ...], dtype: torch.dtype, count: int
) -> None:
    base, *experts = weights_of(shape, dtype, count)
    for by_row in (False, True):
        columns = shape[-1] if by_row else base.numel()
        expected = model_stock(base, experts, columns)
        found = merge("model_stock", base, experts, parameters={"filter_wise": by_row})
        # Where the ratio is large, nearly opposed changes are blown up with their roundings.
        deltas = np.abs(deltas_of(base, experts)).sum(0)
        ratio = np.abs(expected - base.double().numpy()) / np.maximum(deltas, 1e-30)
        size = base.abs().double().numpy() + deltas * (1 + 3 * ratio.max())
        assert (np.abs(found.double().numpy() - expected) <= 8 * EPS * size).all()


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, 1.5])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("near", [True, False])
def test_slerp_against_the_oracle(dtype: torch.dtype, t: float, near: bool) -> None:
    for shape in SHAPES:
        base, expert, other, _ = weights_of(shape, dtype)
        expert = expert if near else (other.flip(0) + 0.1 * expert).contiguous()
        a, b = base.double().numpy(), expert.double().numpy()
        cosine = (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())
        shares = [1 - t, t]
        if abs(cosine) <= 0.9995:
            angle = math.acos(cosine)
            shares = [math.sin(share * angle) / math.sin(angle) for share in shares]
        expected = shares[0] * a + shares[1] * b
        size = abs(shares[0]) * np.abs(a) + abs(shares[1]) * np.abs(b)
        found = merge("slerp", base, [expert], parameters={"t": t})
        assert (np.abs(found.double().numpy() - expected) <= 4 * EPS * size).all()


def test_slerp_where_there_is_no_angle() -> None:
    """A zero weight stands at a right angle to all; opposed weights are mixed linearly."""
    zero, one = torch.zeros(4), torch.ones(4)
    found = merge("slerp", zero, [one], parameters={"t": 0.25})
    assert torch.allclose(found, math.sin(math.pi / 8) * one)
    assert torch.equal(merge("slerp", one, [-one], parameters={"t": 0.25}), 0.5 * one)


@pytest.mark.parametrize("dtype", DTYPES)
def test_passthrough_is_the_model(dtype: torch.dtype) -> None:
    base, expert = weights_of((30, 41), dtype, 1)
    expert[0, 0] = -0.0
    found = merge("passthrough", base, [expert], out_dtype=dtype)
    assert torch.equal(found.view(torch.uint8), expert.view(torch.uint8))
    assert found.data_ptr() != expert.data_ptr()
    found = merge("passthrough", base, [expert], parameters={"scale": [-0.5]}, out_dtype=dtype)
    assert torch.equal(found, -0.5 * expert)


NEW = [name for name in METHODS if name in {m for m, _ in SETTINGS.values()}]
NEW += ["model_stock", "slerp", "passthrough"]


def family_of(method: str, base: torch.Tensor, *experts: torch.Tensor) -> list[torch.Tensor]:
    return list(experts[:1] if METHODS[method].experts == (1, 1) else experts)


@pytest.mark.parametrize("method", NEW)
def test_degenerate_weights(method: str) -> None:
    """Nothing changed, one expert changed, equal experts, one entry, no entries, no axes."""
    sparse = {"density": 0.5} if "density" in METHODS[method].specs else {}
    base, *experts = weights_of((12, 9), torch.bfloat16)
    same = merge(method, base, family_of(method, base, base, base, base), parameters=sparse)
    assert torch.equal(same, base.float())
    for given in ([base, experts[0], base], [experts[0]] * 3):
        found = merge(method, base, family_of(method, base, *given), parameters=sparse)
        assert bool(found.isfinite().all())
    for shape in ((1,), (), (0,), (0, 3), (3, 0)):
        one = [torch.full(shape, value) for value in (0.5, 0.75, 0.25, 0.75)]
        found = merge(method, one[0], family_of(method, *one), parameters=sparse)
        assert found.shape == shape
        assert bool(found.isfinite().all())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("method", NEW)
def test_not_a_number_is_refused(method: str, bad: float) -> None:
    base, *experts = weights_of((12, 9), torch.float32)
    experts[0][3, 3] = bad
    with pytest.raises(ResmError, match="NaN or Inf"):
        merge(method, base, family_of(method, base, *experts))


@pytest.mark.parametrize("method", NEW)
def test_one_expert(method: str) -> None:
    base, expert = weights_of((12, 9), torch.float32, 1)
    if method == "model_stock":
        with pytest.raises(UsageError, match="expected: at least 2"):
            merge(method, base, [expert])
        return
    if method != "slerp":
        assert torch.allclose(merge(method, base, [expert]), expert, atol=1e-7)


@pytest.mark.parametrize("seed", range(8))
def test_an_expert_in_float64_beside_others_in_float32(seed: int) -> None:
    """Thresholds hold for the deltas that are merged: in float64, of every expert."""
    generator = torch.Generator().manual_seed(seed)
    base, change = torch.randn(2, 40, 50, generator=generator)
    experts = [0.01 * change, base.double()]
    parameters = {"density": 0.5, "normalize": False}
    found = merge("ties", base, experts, weights=[1.0, 0.0], parameters=parameters)
    assert int((found != base).sum()) == 1000


def test_slerp_of_what_no_norm_holds() -> None:
    base, expert = weights_of((5, 6), torch.float64, 1)
    with pytest.raises(ResmError, match="do not fit"):
        merge("slerp", base * 1e200, [expert * -1e200], out_dtype=torch.float64)
    with pytest.raises(ResmError, match="do not fit"):
        merge("slerp", base * 1e200, [expert], out_dtype=torch.float64)


def test_model_stock_of_what_no_norm_holds() -> None:
    base, *experts = weights_of((5, 6), torch.float64, 2)
    with pytest.raises(ResmError, match="do not fit"):
        merge("model_stock", base, [experts[0], experts[1] * 1e200], out_dtype=torch.float64)


def test_methods_of_one_model_refuse_two() -> None:
    base, *experts = weights_of((3, 4), torch.float32, 2)
    for method in ("slerp", "passthrough"):
        with pytest.raises(UsageError, match="expected: 1"):
            merge(method, base, experts)


@pytest.mark.parametrize("method", ["model_stock", "slerp", "passthrough"])
def test_methods_without_weights_refuse_them(method: str) -> None:
    base, *experts = weights_of((3, 4), torch.float32, 2)
    experts = family_of(method, base, *experts)
    with pytest.raises(UsageError, match=f"{method} takes no weights"):
        merge(method, base, experts, weights=[0.5] * len(experts))


@pytest.mark.parametrize("method", ["della", "della_linear"])
def test_della_names_every_probability_out_of_range(method: str) -> None:
    base, *experts = weights_of((3, 4), torch.float32, 3)
    given = {"density": [0.1, 0.5, 0.9], "epsilon": 0.15}
    with pytest.raises(UsageError, match=r"expert 1: density 0\.1.*; expert 3: density 0\.9"):
        merge(method, base, experts, parameters=given)
    ends = {"density": [0.0, 1.0, 0.5], "epsilon": 0.15}
    assert merge(method, base, experts, parameters=ends).shape == base.shape


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("dare_ties", {"seed": -1}),
        ("dare_ties", {"seed": 1.5}),
        ("breadcrumbs", {"gamma": 1.5}),
        ("ties", {"density": math.nan}),
        ("ties", {"density": [0.5, 0.5]}),
        ("ties", {"epsilon": 0.1}),
        ("slerp", {"t": "half"}),
    ],
)
def test_wrong_parameters_are_named(method: str, parameters: dict[str, Any]) -> None:
    base, *experts = weights_of((3, 4), torch.float32)
    with pytest.raises(UsageError, match=next(iter(parameters))):
        merge(method, base, family_of(method, base, *experts), parameters=parameters)


DRAWN = ["dare_linear", "dare_ties", "della_linear", "della"]


@pytest.mark.parametrize("method", DRAWN)
def test_a_draw_hangs_on_seed_name_and_place(method: str) -> None:
    base, *experts = weights_of((40, 50), torch.float32)
    given = {"density": 0.5, "seed": 1}
    first = merge(method, base, experts, parameters=given)
    assert torch.equal(first, merge(method, base, experts, parameters=given))
    assert not torch.equal(first, merge(method, base, experts, parameters={**given, "seed": 2}))
    assert not torch.equal(first, merge(method, base, experts, parameters=given, name="other"))
    turned = merge(method, base, experts[::-1], parameters=given)
    assert not torch.allclose(first, turned, atol=1e-6)


@pytest.mark.parametrize("method", ["dare_linear", "della_linear"])
def test_draws_keep_their_share_and_do_not_hang_together(method: str) -> None:
    """Deltas of equal magnitude, weighted so that the sum shows which experts were kept."""
    count, density = 1 << 16, 0.3
    base = torch.zeros(64, count // 64)
    weights, given = [1.0, 2.0, 4.0], {"density": density, "rescale": False}
    if method == "della_linear":
        given["epsilon"] = 0.0
    bits = merge(method, base, [torch.ones_like(base)] * 3, weights=weights, parameters=given)
    found = [(bits.int() >> t & 1).bool().view(-1) for t in range(3)]
    other = merge(method, base, [torch.ones_like(base)], parameters=given, name="another weight")
    found.append(other.bool().view(-1))
    for one in found:
        share = float(one.double().mean())
        assert abs(share - density) < 5 * math.sqrt(density * (1 - density) / count)
    for one, two in itertools.combinations(found, 2):
        both = float((one & two).double().mean())
        assert abs(both - density**2) < 5 * math.sqrt(density**2 * (1 - density**2) / count)


@pytest.mark.parametrize("method", DRAWN)
def test_a_rescaled_draw_keeps_the_sum_of_magnitudes(method: str) -> None:
    base, expert = weights_of((40, 50), torch.float32, 1)
    found = merge(method, base, [expert], parameters={"density": 0.4})
    total = float((expert - base).double().abs().sum())
    assert float((found - base).double().abs().sum()) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("method", ["breadcrumbs", "dare_ties", "della"])
def test_checkpoints_do_not_hang_on_shards(method: str, tmp_path: Path) -> None:
    """Whole checkpoints in one shard or many, by one worker or two; the seed is in the recipe."""
    base, experts = save_family(tmp_path, experts=3)
    given = {"density": 0.5, "gamma": 0.1} if method == "breadcrumbs" else {"density": 0.5}
    merged = []
    for i, (shard_size, workers) in enumerate((("5GB", 1), ("2KB", 2))):
        output = tmp_path / f"out{i}"
        resm_kernels.merge(
            base, experts, output, method, parameters=given, shard_size=shard_size, workers=workers
        )
        files = sorted(output.glob("*.safetensors"))
        merged.append({k: v for file in files for k, v in load_file(file).items()})
        assert (len(files) == 1) == (i == 0)
    assert merged[0].keys() == merged[1].keys()
    assert all(torch.equal(value, merged[1][name]) for name, value in merged[0].items())
    origin = load_file(base / "model.safetensors")
    assert any(not torch.equal(value, origin[name]) for name, value in merged[0].items())


@pytest.mark.parametrize("method", NEW)
def test_factored_experts_are_their_whole_weights(method: str) -> None:
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(20, 30, generator=generator)
    pairs = [
        (torch.randn(20, 2, generator=generator), torch.randn(30, 2, generator=generator))
        for _ in range(3)
    ]
    factored: list[Any] = [FactoredDelta(0.1 * left, right) for left, right in pairs]
    factored = factored[:1] if METHODS[method].experts == (1, 1) else factored
    whole = Inputs("weight", base, factored).whole()
    parameters = {"density": 0.5} if "density" in METHODS[method].specs else {}
    options = METHODS[method].make_options(parameters, len(whole))
    shares = [1.0] * len(whole)
    merged = [
        merge_weight(METHODS[method], Inputs("weight", base, e), shares, options, torch.float32)
        for e in (factored, whole)
    ]
    assert torch.equal(merged[0].tensor, merged[1].tensor)
    assert merged[0].rule == method


@pytest.mark.parametrize("method", NEW)
def test_a_sweep_looks_once(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another lambda, other weights: no threshold is counted, no sum taken, nothing drawn again."""
    looked = []

    def counted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: (looked.append(name), call(*args, **kwargs))[1]

    for module, name in (
        (sparsifying, "trim"),
        (sparsifying, "rank_drop"),
        (sparsifying, "masked_norms"),
        (averaging, "gram"),
    ):
        monkeypatch.setattr(module, name, counted(name, getattr(module, name)))
    chosen = METHODS[method]
    base, *experts = weights_of((12, 9), torch.float32)
    inputs = Inputs("weight", base, family_of(method, base, *experts))
    count = len(inputs.experts)
    parameters = {"density": 0.5, "rescale": True} if "density" in chosen.specs else {}
    swept = {"lambda": (1.0, 0.5)} if "lambda" in chosen.specs else {}
    if method == "slerp":
        swept = {"t": (0.2, 0.7)}
    for name, values in swept.items():
        first, again = (chosen.make_options({**parameters, name: value}, count) for value in values)
        merge_weight(chosen, inputs, [1.0] * count, first, torch.float32)
        before = len(looked)
        assert before > 0
        shared = merge_weight(chosen, inputs, [0.5] * count, again, torch.float32).tensor
        assert len(looked) == before
        alone = Inputs("weight", base, inputs.experts)
        assert torch.equal(
            shared, merge_weight(chosen, alone, [0.5] * count, again, torch.float32).tensor
        )


def test_no_more_memory_than_planned() -> None:
    """Peak of a process over its level before, for weights of 8 MB.

    In a process of its own, whose allocator gives back every buffer: in this one, what earlier
    tests freed would be room for the peak.
    """
    run = subprocess.run(
        [sys.executable, "-c", "from tests.test_family import print_peaks; print_peaks()"],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 16), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(run.stdout)
    assert len(found) == 3 * (len(NEW) + 1)
    # At least half of the output: a smaller peak was not seen.
    wrong = {case: sizes for case, sizes in found.items() if not 4 << 20 < sizes[0] <= sizes[1]}
    assert not wrong


def print_peaks() -> None:
    """Every case's peak and what was planned, as JSON."""
    cases: list[tuple[str, dict[str, Any]]] = []
    for method in NEW:
        sparse = "density" in METHODS[method].specs
        cases.append((method, {"density": 0.5, "rescale": True} if sparse else {}))
    cases.append(("model_stock", {"filter_wise": True}))
    found = {}
    for shape in [(2048, 2048), (2, 1 << 21), (1 << 21, 2)]:
        base, *experts = weights_of(shape, torch.bfloat16)
        for method, given in cases:
            some = family_of(method, base, *experts)
            options = METHODS[method].make_options(given, len(some))
            peak = peak_bytes(functools.partial(merge_afresh, method, base, some, options))
            planned = METHODS[method].workspace(base.shape, len(some), 4, options, "cpu")
            found[f"{method} {given} {shape}"] = peak, planned + base.nbytes + (2 << 20)
    print(json.dumps(found))


def merge_afresh(
    method: str, base: torch.Tensor, experts: Sequence[torch.Tensor], options: Any
) -> None:
    inputs, shares = Inputs("weight", base, experts), [1.0] * len(experts)
    merge_weight(METHODS[method], inputs, shares, options, torch.bfloat16)


def peak_bytes(work: Callable[[], object]) -> int:
    work()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    work()
    return resident("VmHWM") - before


def resident(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) << 10


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
