"""The element-wise and reconstruction ops: references against float64, kernels against both.

Without a GPU the kernels run in Triton's interpreter, which rounds float32 to bf16 towards zero
and multiplies float32 whatever precision is asked for.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
import torch
import triton
from numpy.typing import NDArray
from triton.runtime.interpreter import GridExecutor, interpreter_builder

from resm_kernels.ops import dtypes, elementwise, launch
from resm_kernels.ops.consensus import elected_deltas, weighted_deltas, weighted_sum
from resm_kernels.ops.consensus import kernel as consensus_kernel
from resm_kernels.ops.consensus import reference as consensus_reference
from resm_kernels.ops.delta_stats import delta_stats
from resm_kernels.ops.delta_stats import kernel as stats_kernel
from resm_kernels.ops.delta_stats import reference as stats_reference
from resm_kernels.ops.delta_stats.stats import DeltaStats
from resm_kernels.ops.gram import gram
from resm_kernels.ops.launch import flat_inputs
from resm_kernels.ops.low_rank import add_low_rank
from resm_kernels.ops.low_rank import kernel as low_rank_kernel
from resm_kernels.ops.low_rank import reference as low_rank_reference
from resm_kernels.ops.mask import Mask, drop_key, masked_delta, masked_norms, split_delta, trim
from resm_kernels.ops.mask import kernel as mask_kernel
from resm_kernels.ops.mask import reference as mask_reference
from resm_kernels.ops.mask.mask import BLOCK
from resm_kernels.ops.rank_drop import kernel as rank_kernel
from resm_kernels.ops.rank_drop import rank_drop
from resm_kernels.ops.rank_drop import reference as rank_reference

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="the GPU tests run the kernels themselves"
)

Array = NDArray[np.float64]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = [(1,), (17,), (4095,), (4096,), (4097,), (1, 50), (50, 1), (70, 131)]
EPS = 2.0**-24
"""Half a unit in the last place of float32: the error of one rounding."""
BLOCK_ERROR = 24 * EPS
"""What the kernels' block sums may err by, relatively: 16 entries a thread, 256 threads."""
WEIGHTS = [0.7, -0.2, 1.3]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """New memory is NaN, so that whatever is left unwritten shows; references take many chunks."""
    monkeypatch.setattr(dtypes, "CHUNK", 1001)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def family(
    shape: Sequence[int], dtype: torch.dtype, count: int = 3, seed: int = 0
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A base and experts with heavy tails, ties and exact zeros."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(*shape, generator=generator)
    deltas = [0.02 * torch.randn(*shape, generator=generator) ** 3 for _ in range(count)]
    for delta in deltas:
        delta[torch.rand(*shape, generator=generator) < 0.2] = 0.0
    return base.to(dtype), [(base + delta).to(dtype) for delta in deltas]


def exact(base: torch.Tensor, expert: torch.Tensor) -> Array:
    """The delta as every implementation takes it, in float64."""
    return (expert.float() - base.float()).double().numpy().ravel()


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal to the last bit, or within one bf16 ulp where the interpreter truncates."""
    if found.dtype != torch.bfloat16:
        return torch.equal(found, expected)
    distance = found.view(torch.int16).int() - expected.view(torch.int16).int()
    return bool((distance.abs() <= 1).all())


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transposed": lambda x: x.T,
    "every other column": lambda x: x[:, ::2],
    "rows of a wider matrix": lambda x: x[:, 3:40],
    "unaligned": lambda x: x.reshape(-1)[1:],
    "empty": lambda x: x[:0],
}
LAUNCHED = [name for name in VIEWS if name != "empty"]


def check_stats(
    stats: DeltaStats, a: Array, sigma: float, noise_floor: float, error: float
) -> None:
    """Against float64 sums of the same magnitudes; counts are exact for the given thresholds."""
    mean, rms = a.mean(), math.sqrt((a * a).mean())
    threshold, floor = np.float32(stats.threshold), np.float32(stats.floor)
    assert stats.count == a.size
    assert stats.abs_sum == pytest.approx(a.sum(), rel=error)
    assert stats.square_sum == pytest.approx((a * a).sum(), rel=2 * error)
    assert stats.largest == a.max()
    assert stats.zero_count == (a == 0).sum()
    assert stats.threshold == pytest.approx(mean + sigma * a.std(), rel=2 * error)
    assert stats.floor == pytest.approx(noise_floor * rms, rel=2 * error)
    assert stats.outlier_count == (a > threshold).sum()
    assert stats.outlier_mass == pytest.approx(a[a > threshold].sum(), rel=error)
    assert stats.sparse_count == (a <= floor).sum()


@pytest.mark.parametrize(("sigma", "noise_floor"), [(1.5, 0.3), (0.0, 3.0)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_delta_stats(
    shape: tuple[int, ...], dtype: torch.dtype, sigma: float, noise_floor: float
) -> None:
    base, experts = family(shape, dtype)
    experts[1] = base.clone()
    for module, error in ((stats_reference, 1e-12), (stats_kernel, BLOCK_ERROR)):
        found = module.delta_stats(base, experts, sigma=sigma, noise_floor=noise_floor)
        for expert, stats in zip(experts, found, strict=True):
            check_stats(stats, np.abs(exact(base, expert)), sigma, noise_floor, error)


def test_delta_stats_of_more_blocks_than_one_step_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    base, experts = family((5 * elementwise.SUMMED + 3,), torch.bfloat16)
    monkeypatch.setattr(stats_kernel, "LANES", 2)
    found = stats_kernel.delta_stats(base, experts, sigma=1.5, noise_floor=0.3)
    for expert, stats in zip(experts, found, strict=True):
        check_stats(stats, np.abs(exact(base, expert)), 1.5, 0.3, BLOCK_ERROR)


@pytest.mark.parametrize("module", [stats_reference, stats_kernel])
@pytest.mark.parametrize("unit", [1e-38, 1e-30, 1.0, 1e30, 1e38])
def test_delta_stats_of_any_size(module: ModuleType, unit: float) -> None:
    """Squares of float32 numbers leave its range; the sums do not."""
    expert = torch.linspace(-1, 1, 5000) * unit
    (stats,) = module.delta_stats(torch.zeros(5000), [expert], sigma=1.0, noise_floor=0.5)
    check_stats(stats, np.abs(exact(torch.zeros(5000), expert)), 1.0, 0.5, BLOCK_ERROR)


@pytest.mark.parametrize("module", [stats_reference, stats_kernel])
@pytest.mark.parametrize("sigma", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("size", [0.7, 0.1, 1e-3])
def test_no_entry_of_a_constant_delta_is_an_outlier(
    size: float, sigma: float, module: ModuleType
) -> None:
    (stats,) = module.delta_stats(
        torch.zeros(20_000), [torch.full((20_000,), size)], sigma=sigma, noise_floor=0.5
    )
    assert (stats.outlier_count, stats.sparse_count) == (0, 0)


@pytest.mark.parametrize("module", [stats_reference, stats_kernel])
@pytest.mark.parametrize("spread", [0.0, 1e-6, 1e-4])
def test_a_nearly_constant_delta_keeps_its_spread(module: ModuleType, spread: float) -> None:
    """One step of a sign-like optimiser: the deviation is far below the mean."""
    generator = torch.Generator().manual_seed(0)
    expert = 0.1 * (1 + spread * torch.randn(20_000, generator=generator))
    (stats,) = module.delta_stats(torch.zeros(20_000), [expert], sigma=3.0)
    a = expert.double().numpy()
    error = 2 * BLOCK_ERROR * a.mean()
    assert stats.threshold - a.mean() == pytest.approx(3 * a.std(), rel=1e-3, abs=error)
    assert stats.outlier_count <= 0.01 * a.size


Band = tuple[float, float]
"""Shares of the entries: the largest magnitudes down to the first stay, but those of the second."""


def leading(delta: Array, kept: int) -> NDArray[np.bool_]:
    """So many of the largest magnitudes, of equal ones the first."""
    keep = np.zeros(delta.size, dtype=bool)
    keep[np.argsort(-np.abs(delta), kind="stable")[:kept]] = True
    return keep


def random_numbers(key: int, count: int) -> NDArray[np.uint32]:
    """NumPy's own Philox, 32 bits an entry."""
    halves = np.array([key % 2**64, key >> 64], dtype=np.uint64)
    return np.random.Philox(key=halves).random_raw(count // 2 + 4).view(np.uint32)[:count]


def oracle_mask(delta: Array, mask: Mask, band: Band, weight: float) -> Array:
    """What `masked_delta` promises, in float64 and from NumPy's own generator."""
    last, first = (int(share * delta.size) for share in band)
    kept = leading(delta, last) & ~leading(delta, first)
    kept &= np.abs(delta) > np.float32(mask.floor)
    if mask.density < 1.0:
        kept &= random_numbers(mask.key, delta.size) < mask.density * 2**32
    clip = float(np.float32(mask.clip))
    rescale = 1 / mask.density if mask.rescale is None else mask.rescale
    factor = float(np.float32(weight * rescale))
    return np.where(kept, np.clip(delta, -clip, clip), 0.0) * factor


KEY = drop_key(7, "layers.0.weight", 1)
MASKS = {
    "nothing": (Mask(), (1.0, 0.0)),
    "floor": (Mask(floor=0.002), (1.0, 0.0)),
    "floor zero": (Mask(floor=0.0), (1.0, 0.0)),
    "clip": (Mask(clip=0.01), (1.0, 0.0)),
    "drop": (Mask(density=0.3, key=KEY), (1.0, 0.0)),
    "drop, rescaled": (Mask(density=0.3, key=KEY, rescale=1.7), (1.0, 0.0)),
    "trim": (Mask(), (0.4, 0.0)),
    "trim to nothing": (Mask(), (0.0, 0.0)),
    "band": (Mask(), (0.9, 0.3)),
    "no band": (Mask(), (0.5, 0.5)),
    "everything": (Mask(floor=0.001, clip=0.05, density=0.75, key=KEY), (0.6, 0.05)),
}


def make_mask(case: str, base: torch.Tensor, expert: torch.Tensor) -> tuple[Mask, Band]:
    mask, band = MASKS[case]
    if band == (1.0, 0.0):
        return mask, band
    kept = [int(share * base.numel()) for share in band]
    (threshold, cut), (ceiling, ceiling_cut) = mask_reference.trim(base, [expert] * 2, kept)
    ends = {"threshold": threshold, "cut": cut, "ceiling": ceiling, "ceiling_cut": ceiling_cut}
    return replace(mask, **ends), band


@pytest.mark.parametrize("module", [mask_reference, mask_kernel])
@pytest.mark.parametrize("case", MASKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_masks_against_the_oracle(case: str, dtype: torch.dtype, module: ModuleType) -> None:
    base, (expert,) = family((70, 131), dtype, 1)
    mask, band = make_mask(case, base, expert)
    found = module.masked_delta(base, expert, mask, weight=-0.7)
    expected = oracle_mask(exact(base, expert), mask, band, -0.7)
    error = np.abs(found.double().numpy().ravel() - expected)
    assert (error <= EPS * np.abs(expected)).all()
    high, low = module.split_delta(base, expert, mask, weight=-0.7)
    pair = high.double() + low.double()
    # Truncation by the interpreter costs a bit in each part.
    bound = 2.0**-17 if module is mask_reference else 2.0**-15
    assert (np.abs(pair.numpy().ravel() - expected) <= (bound + EPS) * np.abs(expected)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", MASKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_mask_kernels_give_the_references_bytes(
    shape: tuple[int, ...], case: str, dtype: torch.dtype
) -> None:
    base, (expert,) = family(shape, dtype, 1)
    mask, _ = make_mask(case, base, expert)
    for out in DTYPES:
        given = (base, expert, mask)
        found = mask_kernel.masked_delta(*given, weight=0.9, out_dtype=out)
        assert found.shape == base.shape
        assert same(found, mask_reference.masked_delta(*given, weight=0.9, out_dtype=out))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("density", [0.0, 1e-9, 0.1, 0.5, 0.999, 1.0])
def test_trim_keeps_the_largest_and_of_equals_the_first(density: float, dtype: torch.dtype) -> None:
    base, experts = family((70, 131), dtype)
    experts.append(base.clone())
    experts.append(base + 1)
    # One number each: all and none are not counted, and must not shift the others.
    experts.append(experts[0])
    share = int(density * base.numel())
    numbers = [share, base.numel(), 1, share, share, 0]
    found = mask_reference.trim(base, experts, numbers)
    for expert, number, (threshold, cut) in zip(experts, numbers, found, strict=True):
        kept = mask_reference.masked_delta(base, expert, Mask(threshold=threshold, cut=cut))
        delta = (expert.to(kept.dtype) - base.to(kept.dtype)).double().numpy().ravel()
        expected = np.where(leading(delta, number), delta, 0.0)
        assert np.array_equal(kept.double().numpy().ravel(), expected)
    if dtype != torch.float64:
        assert mask_kernel.trim(base, experts, numbers) == found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (3 * BLOCK + 5,)])
def test_masked_norms(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The kernel's sums are the reference's to the bit: rescaled methods hang on them."""
    base, experts = family(shape, dtype, 4)
    experts[3] = base.clone()
    cases = ("everything", "drop", "nothing", "band")
    masks = [make_mask(case, base, e)[0] for case, e in zip(cases, experts, strict=True)]
    found = mask_reference.masked_norms(base, experts, masks)
    assert mask_kernel.masked_norms(base, experts, masks) == found
    for case, expert, mask, (whole, left) in zip(cases, experts, masks, found, strict=True):
        delta = exact(base, expert)
        kept = oracle_mask(delta, replace(mask, rescale=1.0), MASKS[case][1], 1.0)
        assert whole == pytest.approx(np.abs(delta).sum(), rel=2.0**-27)
        assert left == pytest.approx(np.abs(kept).sum(), rel=2.0**-27)


@pytest.mark.parametrize("unit", [1e-45, 1e-38, 1e-30, 1.0, 1e30, 3e38])
def test_masked_norms_of_any_size(unit: float) -> None:
    expert = torch.linspace(-1, 1, 5000) * unit
    given = (torch.zeros(5000), [expert], [Mask()])
    found = mask_reference.masked_norms(*given)
    assert mask_kernel.masked_norms(*given) == found
    total = float(expert.double().abs().sum())
    assert found[0] == (pytest.approx(total, rel=2.0**-27),) * 2
    assert mask_reference.masked_norms(given[0].double(), [expert.double()], given[2]) == found


def test_masked_norms_of_no_entries_are_zero() -> None:
    assert masked_norms(torch.zeros(0), [torch.zeros(0)], [Mask(density=0.5)]) == [(0.0, 0.0)]


def rank_oracle(
    base: torch.Tensor, expert: torch.Tensor, density: float, epsilon: float
) -> NDArray[np.bool_]:
    """Whether an entry is kept, from ranks by a stable sort and NumPy's generator."""
    columns = base.shape[-1]
    delta = exact(base, expert).reshape(-1, columns)
    ranks = np.abs(delta).argsort(-1, kind="stable").argsort(-1, kind="stable")
    share = ranks / (columns - 1) if columns > 1 else np.full(delta.shape, 0.5)
    probability = density - epsilon + 2 * epsilon * share.ravel()
    numbers = random_numbers(KEY, delta.size)
    clear = np.abs(numbers - probability * 2.0**32) > 1
    assert clear.all()
    return numbers < probability * 2.0**32


@pytest.mark.parametrize(("density", "epsilon"), [(0.5, 0.3), (0.2, 0.0), (0.9, 0.09)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (3, 5, 7)])
def test_rank_drop(
    shape: tuple[int, ...], dtype: torch.dtype, density: float, epsilon: float
) -> None:
    base, (expert,) = family(shape, dtype, 1)
    given = {"density": density, "epsilon": epsilon, "key": KEY}
    kept = torch.from_numpy(rank_oracle(base, expert, density, epsilon)).view(base.shape)
    before = expert.clone()
    expected = torch.where(kept, expert, base)
    for module in (rank_reference, rank_kernel):
        found = module.rank_drop(base, expert, **given)
        assert torch.equal(found, expected)
        assert torch.equal(expert, before)
    wide = rank_reference.rank_drop(base.double(), expert.double(), **given)
    assert torch.equal(wide, expected.double())
    mixed = rank_drop(base, expert.float(), **given)
    assert torch.equal(mixed, expected.float())


def test_rank_drop_keeps_the_large_more_often() -> None:
    rows, columns = 4000, 9
    expert = torch.arange(1.0, columns + 1).expand(rows, -1)
    found = rank_drop(torch.zeros(rows, columns), expert, density=0.5, epsilon=0.4, key=KEY)
    share = (found != 0).double().mean(0)
    expected = torch.linspace(0.1, 0.9, columns, dtype=torch.float64)
    assert bool(((share - expected).abs() < 5 * (expected * (1 - expected) / rows).sqrt()).all())


@pytest.mark.parametrize(("density", "epsilon"), [(0.1, 0.1), (0.9, 0.1), (0.5, -0.1), (1.0, 0.0)])
def test_rank_drop_refuses_probabilities_out_of_range(density: float, epsilon: float) -> None:
    with pytest.raises(ValueError, match=r"expected both ends in \(0, 1\)"):
        rank_drop(torch.zeros(3), torch.ones(3), density=density, epsilon=epsilon, key=0)


@pytest.mark.parametrize("columns", [1, 50, 70 * 50])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_gram(dtype: torch.dtype, columns: int) -> None:
    """Rows that fit a chunk, and rows that are cut."""
    base, experts = family((70, 50), dtype)
    wide = [tensor.double().view(-1, columns) for tensor in (base, *experts)]
    deltas = torch.stack([tensor - wide[0] for tensor in wide[1:]], 1)
    found = gram(experts, base=base, columns=columns)
    assert torch.allclose(found, deltas @ deltas.mT, rtol=1e-12, atol=0)
    whole = torch.stack(wide[1:], 1)
    found = gram([expert.T for expert in experts], columns=base.numel())
    total = (whole @ whole.mT).sum(0, keepdim=True)
    assert torch.allclose(found, total, rtol=1e-12, atol=1e-9)
    assert torch.equal(gram([base[:0]], columns=50), torch.zeros(1, 1, 1).double())


def test_a_drop_keeps_its_share_and_its_mean() -> None:
    count, density = 1 << 20, 0.3
    ones = masked_delta(torch.zeros(count), torch.ones(count), Mask(density=density, key=KEY))
    kept = int(ones.count_nonzero())
    assert abs(kept - density * count) < 5 * math.sqrt(count * density * (1 - density))
    assert float(ones.max()) == pytest.approx(1 / density, rel=EPS)
    other = masked_delta(torch.zeros(count), torch.ones(count), Mask(density=density, key=KEY + 1))
    both = int((ones * other).count_nonzero())
    assert abs(both - density**2 * count) < 5 * math.sqrt(count * density**2)


def test_keys_differ_by_seed_name_and_expert() -> None:
    keys = {
        drop_key(s, n, e) for s, n, e in itertools.product((0, 1), ("a", "a1", "\udcff"), (0, 1))
    }
    assert len(keys) == 12
    assert max(keys) < 2**128


def test_a_mask_does_not_depend_on_the_pieces() -> None:
    """A piece masked where it begins gives the bytes of the whole."""
    base, (expert,) = family((200_000,), torch.float32, 1)
    mask, _ = make_mask("everything", base, expert)
    whole = mask_reference.masked_delta(base, expert, mask)
    for start, stop in ((0, 7), (7, 131), (131, 99_999), (99_999, 200_000)):
        piece = (expert - base)[start:stop]
        assert torch.equal(mask_reference.apply_mask(piece, mask, start, 1.0), whole[start:stop])


@pytest.mark.parametrize("density", [0.0, -1.0, 1.5, math.nan])
def test_no_density_outside_its_range(density: float) -> None:
    with pytest.raises(ValueError, match="expected 0 < density <= 1"):
        Mask(density=density)


@pytest.mark.parametrize("kept", [-1, 4])
def test_no_more_entries_than_there_are(kept: int) -> None:
    with pytest.raises(ValueError, match="expected numbers from 0 to 3"):
        trim(torch.zeros(3), [torch.ones(3)], [kept])


def masks_for(case: str, base: torch.Tensor, experts: Sequence[torch.Tensor]) -> list[Mask] | None:
    if case == "none":
        return None
    return [make_mask(case, base, expert)[0] for expert in experts]


def oracle_terms(
    base: torch.Tensor, experts: Sequence[torch.Tensor], case: str, masks: list[Mask] | None
) -> Array:
    """The masked and weighted deltas in float64, [T, n]."""
    weights = [float(np.float32(w)) for w in WEIGHTS]
    if masks is None:
        return np.stack([w * exact(base, e) for w, e in zip(weights, experts, strict=True)])
    band = MASKS[case][1]
    return np.stack(
        [
            oracle_mask(exact(base, expert), mask, band, weight)
            for expert, mask, weight in zip(experts, masks, WEIGHTS, strict=True)
        ]
    )


COMBINED = ["none", "band", "everything"]
BOTH = (consensus_kernel, consensus_reference)


@pytest.mark.parametrize("module", [consensus_reference, consensus_kernel])
@pytest.mark.parametrize("case", COMBINED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_combinations_against_the_oracle(dtype: torch.dtype, case: str, module: ModuleType) -> None:
    base, experts = family((70, 131), dtype)
    origin, masks = base.double().numpy().ravel(), masks_for(case, base, experts)
    terms = oracle_terms(base, experts, case, masks)
    size = np.abs(terms).sum(0)
    given = {"scale": 0.9, "out_dtype": torch.float32, "masks": masks}

    found = module.weighted_deltas(base, experts, WEIGHTS, divisor=3.0, **given)
    expected = origin + 0.9 / 3 * terms.sum(0)
    # Three products, three sums, quotient, scale and the sum with the base, each rounded once.
    bound = 9 * EPS * (np.abs(origin) + size)
    assert (np.abs(found.double().numpy().ravel() - expected) <= bound).all()

    for elect, mean in itertools.product(("sum", "count"), (True, False)):
        found = module.elected_deltas(base, experts, WEIGHTS, elect=elect, mean=mean, **given)
        vote = terms.sum(0) if elect == "sum" else np.sign(terms).sum(0)
        chosen = np.where(vote >= 0, terms > 0, terms < 0)
        total = np.where(chosen, terms, 0.0).sum(0)
        if mean:
            weight = np.where(chosen, np.array(WEIGHTS)[:, None], 0.0).sum(0)
            total = total / np.where(np.abs(weight) < 1e-8, 1.0, weight)
        expected = origin + 0.9 * total
        clear = np.abs(vote) > 3 * EPS * size if elect == "sum" else np.ones_like(size, dtype=bool)
        clear |= size == 0
        bound = 9 * EPS * (np.abs(origin) + 5 * size)
        error = np.abs(found.double().numpy().ravel() - expected)
        assert clear.mean() > 0.99
        assert (error <= bound)[clear].all()

    divisor = sum(WEIGHTS)
    total = sum(w * e.double() for w, e in zip(WEIGHTS, experts, strict=True)) / divisor
    size = sum(abs(w) * e.double().abs() for w, e in zip(WEIGHTS, experts, strict=True))
    found = module.weighted_sum(experts, WEIGHTS, out_dtype=torch.float32, normalize=True)
    assert bool(((found.double() - total).abs() <= 5 * EPS * size / divisor).all())


@pytest.mark.parametrize("case", COMBINED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_combination_kernels_give_the_references_bytes(
    shape: tuple[int, ...], dtype: torch.dtype, case: str
) -> None:
    base, experts = family(shape, dtype)
    masks = masks_for(case, base, experts)
    for out in DTYPES:
        given = {"scale": 0.9, "out_dtype": out, "masks": masks}
        call = (base, experts, WEIGHTS)
        found = consensus_kernel.weighted_deltas(*call, divisor=3.0, **given)
        assert same(found, consensus_reference.weighted_deltas(*call, divisor=3.0, **given))
        for elect, mean in itertools.product(("sum", "count"), (True, False)):
            how = {"elect": elect, "mean": mean, **given}
            found = consensus_kernel.elected_deltas(*call, **how)
            assert same(found, consensus_reference.elected_deltas(*call, **how))


@pytest.mark.parametrize("case", COMBINED)
@pytest.mark.parametrize("count", [1, 4, 5, 9])
def test_any_number_of_experts(count: int, case: str) -> None:
    """Their blocks are read four at a time."""
    base, experts = family((3, 1000), torch.float32, count)
    weights = [0.3 + 0.1 * t for t in range(count)]
    masks = masks_for(case, base, experts)
    given = {"scale": 0.9, "out_dtype": torch.float32, "masks": masks}
    for found, expected in (
        [module.weighted_deltas(base, experts, weights, **given) for module in BOTH],
        [module.elected_deltas(base, experts, weights, elect="sum", mean=True, **given)
         for module in BOTH],
    ):  # fmt: skip
        assert torch.equal(found, expected)
    # The interpreter does not fuse: every term rounds once more than in the reference.
    found, expected = (m.weighted_sum(experts, weights, out_dtype=torch.float32) for m in BOTH)
    size = sum(w * e.abs() for w, e in zip(weights, experts, strict=True))
    assert bool(((found - expected).abs() <= 2 * count * EPS * size).all())


@pytest.mark.parametrize("cut", [0, 1, 1023, 1024, 1025, 2048, 2999, 3000])
def test_a_cut_anywhere_in_a_block(cut: int) -> None:
    base, expert = torch.zeros(3000), torch.linspace(-2, 2, 3000).round()
    for threshold, ceiling in ((1.0, math.inf), (0.0, math.inf), (math.inf, math.inf), (0.0, 1.0)):
        mask = Mask(threshold=threshold, cut=cut, ceiling=ceiling, ceiling_cut=cut)
        found, expected = (
            m.masked_delta(base, expert, mask) for m in (mask_kernel, mask_reference)
        )
        assert torch.equal(found, expected)


def test_an_election_without_weight_stays_a_sum() -> None:
    base, experts = torch.zeros(3), [torch.tensor([1.0, 2.0, 0.0]), torch.tensor([1.0, -2.0, 0.0])]
    given = {"elect": "sum", "mean": True, "scale": 1.0, "out_dtype": torch.float32}
    for module in (consensus_reference, consensus_kernel):
        # Weight 1 and -1: the first entries cancel, the second agree with weights that cancel.
        found = module.elected_deltas(base, experts, [1.0, -1.0], **given)
        assert found.tolist() == [1.0, 4.0, 0.0]


@pytest.mark.parametrize("view", LAUNCHED)
def test_kernels_take_views(view: str) -> None:
    base, experts = family((64, 48), torch.bfloat16)
    base, experts = VIEWS[view](base), [VIEWS[view](expert) for expert in experts]
    plain, copies = base.contiguous().clone(), [expert.contiguous().clone() for expert in experts]
    found = stats_kernel.delta_stats(base, experts, noise_floor=0.1)
    assert found == stats_kernel.delta_stats(plain, copies, noise_floor=0.1)
    mask = Mask(floor=0.01, density=0.5, key=KEY)
    assert torch.equal(
        mask_kernel.masked_delta(base, experts[0], mask),
        mask_kernel.masked_delta(plain, copies[0], mask),
    )
    kept = [base.numel() // 3] * 3
    assert mask_kernel.trim(base, experts, kept) == mask_kernel.trim(plain, copies, kept)
    masks = [mask] * 3
    found = mask_kernel.masked_norms(base, experts, masks)
    assert found == mask_kernel.masked_norms(plain, copies, masks)
    given = {"density": 0.5, "epsilon": 0.2, "key": KEY}
    assert torch.equal(
        rank_kernel.rank_drop(base, experts[0], **given),
        rank_kernel.rank_drop(plain, copies[0], **given),
    )
    given = {"scale": 0.5, "out_dtype": torch.float32}
    assert torch.equal(
        consensus_kernel.weighted_deltas(base, experts, WEIGHTS, **given),
        consensus_kernel.weighted_deltas(plain, copies, WEIGHTS, **given),
    )
    if base.dim() == 2:
        left, right = torch.randn(base.shape[0], 5), torch.randn(base.shape[1], 5)
        given = {"scales": [1.0], "out_dtype": torch.float32}
        assert torch.equal(
            low_rank_kernel.add_low_rank(base, left, right, **given)[0],
            low_rank_kernel.add_low_rank(plain, left, right, **given)[0],
        )


@pytest.mark.parametrize("view", VIEWS)
def test_references_take_views_and_nothing(view: str) -> None:
    base, experts = family((64, 48), torch.bfloat16)
    base, experts = VIEWS[view](base), [VIEWS[view](expert) for expert in experts]
    plain, copies = base.contiguous(), [expert.contiguous() for expert in experts]
    assert delta_stats(base, experts) == delta_stats(plain, copies)
    kept = [base.numel() // 2] * 3
    assert trim(base, experts, kept) == trim(plain, copies, kept)
    masks = [Mask(density=0.5, key=KEY)] * 3
    assert masked_norms(base, experts, masks) == masked_norms(plain, copies, masks)
    ranked = rank_drop(base, experts[0], density=0.5, epsilon=0.2, key=KEY)
    assert torch.equal(ranked, rank_drop(plain, copies[0], density=0.5, epsilon=0.2, key=KEY))
    assert torch.equal(masked_delta(base, experts[0]), masked_delta(plain, copies[0]))
    assert split_delta(base, experts[0])[0].shape == base.shape
    given = {"scale": 0.5, "out_dtype": torch.float16}
    assert torch.equal(
        weighted_deltas(base, experts, WEIGHTS, **given),
        weighted_deltas(plain, copies, WEIGHTS, **given),
    )
    elected = elected_deltas(base, experts, WEIGHTS, elect="sum", mean=True, **given)
    assert elected.shape == base.shape
    assert weighted_sum(experts, WEIGHTS, out_dtype=torch.float16).shape == base.shape


def test_experts_of_another_dtype_are_read_in_the_widest() -> None:
    base, _ = family((4097,), torch.bfloat16)
    _, experts = family((4097,), torch.float32)
    experts[1] = experts[1].half()
    given = {"scale": 0.5, "out_dtype": torch.float32}
    assert torch.equal(
        consensus_kernel.weighted_deltas(base, experts, WEIGHTS, **given),
        consensus_reference.weighted_deltas(base, experts, WEIGHTS, **given),
    )
    assert {tensor.dtype for tensor in flat_inputs((base, *experts))} == {torch.float32}


LOW_RANK_SHAPES = [(130, 70, 33), (64, 64, 32), (1, 5, 3), (200, 1, 7), (97, 128, 64)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns", "inner"), LOW_RANK_SHAPES)
def test_low_rank(rows: int, columns: int, inner: int, dtype: torch.dtype) -> None:
    """No worse than twice the error of plain float32, plus the rounding to the output."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(rows, columns, generator=generator).to(dtype)
    left = torch.randn(rows, inner, generator=generator)
    right = torch.randn(columns, inner, generator=generator)
    values = torch.rand(inner, generator=generator)
    scales = [0.5, -2.0]
    for given in (None, values):
        scaled = left.double() * (1.0 if given is None else given.double())
        product = scaled @ right.double().T
        size = scaled.abs() @ right.double().abs().T
        for out in DTYPES:
            ulp = torch.finfo(out).eps / (1 if out == torch.bfloat16 else 2)
            for module in (low_rank_reference, low_rank_kernel):
                found = module.add_low_rank(
                    base, left, right, scales=scales, out_dtype=out, values=given
                )
                for scale, merged in zip(scales, found, strict=True):
                    expected = base.double() + scale * product
                    bound = (inner + 3) * EPS * (abs(scale) * size + base.double().abs())
                    bound += ulp * (expected.abs() + bound)
                    assert merged.dtype == out
                    assert bool(((merged.double() - expected).abs() <= bound).all())


def test_a_scale_does_not_depend_on_the_others() -> None:
    base, left, right = torch.randn(70, 50), torch.randn(70, 9), torch.randn(50, 9)
    for module in (low_rank_reference, low_rank_kernel):
        given = {"out_dtype": torch.float32}
        both = module.add_low_rank(base, left, right, scales=[0.3, 1.7], **given)
        alone = module.add_low_rank(base, left, right, scales=[1.7], **given)
        assert torch.equal(both[1], alone[0])


def test_other_shapes_are_refused_by_both() -> None:
    """The border checks, before a kernel would read past an end."""
    base, other = torch.zeros(2, 3), [torch.zeros(3, 2)]
    given = {"scale": 1.0, "out_dtype": torch.float32}
    for call in (
        lambda: delta_stats(base, other),
        lambda: trim(base, other, [1]),
        lambda: masked_norms(base, other, [Mask()]),
        lambda: rank_drop(base, other[0], density=0.5, epsilon=0.2, key=0),
        lambda: gram(other, base=base, columns=1),
        lambda: masked_delta(base, other[0]),
        lambda: split_delta(base, other[0]),
        lambda: weighted_deltas(base, other, [1.0], **given),
        lambda: elected_deltas(base, other, [1.0], elect="sum", mean=True, **given),
        lambda: weighted_sum([base, *other], [1.0] * 2, out_dtype=torch.float32),
    ):
        with pytest.raises(ValueError, match=r"shape \(3, 2\) on cpu, expected \(2, 3\) on cpu"):
            call()
    for left, right, values, name in (
        ((4, 5), (3, 5), None, "left"),
        ((2, 5), (3, 7), None, "right"),
        ((2, 5), (6, 5), None, "right"),
        ((2, 5), (3, 5), 4, "values"),
    ):
        factors = torch.zeros(left), torch.zeros(right)
        with pytest.raises(ValueError, match=f"{name} of shape"):
            add_low_rank(
                *(base, *factors),
                scales=[1.0],
                out_dtype=torch.float32,
                values=None if values is None else torch.ones(values),
            )


@pytest.mark.parametrize("sigma", [-1.0, math.nan])
def test_numbers_outside_their_range_are_refused(sigma: float) -> None:
    base, experts = torch.zeros(3), [torch.ones(3)]
    given = {"mean": True, "scale": 1.0, "out_dtype": torch.float32}
    with pytest.raises(ValueError, match="expected both >= 0"):
        delta_stats(base, experts, sigma=sigma)
    with pytest.raises(ValueError, match="expected at least one"):
        delta_stats(base, [])
    with pytest.raises(ValueError, match="expected at least one"):
        weighted_sum([], [], out_dtype=torch.float32)
    with pytest.raises(ValueError, match="expected clip >= 0"):
        Mask(clip=sigma)
    with pytest.raises(ValueError, match="expected 128 bits"):
        Mask(key=1 << 128)
    with pytest.raises(ValueError, match="expected 'sum' or 'count'"):
        elected_deltas(base, experts, [1.0], elect="Sum", **given)
    for module in (mask_reference, mask_kernel):
        with pytest.raises(ValueError, match="holds NaN"):
            module.trim(torch.zeros(6), [torch.tensor([1.0, math.nan] * 3)], [2])


def test_rank_zero_is_the_base() -> None:
    base = torch.randn(7, 5)
    (merged,) = add_low_rank(
        base, torch.empty(7, 0), torch.empty(5, 0), scales=[2.0], out_dtype=torch.float32
    )
    assert torch.equal(merged, base)


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942"])
@pytest.mark.parametrize("precision", ["tf32x3", "ieee", "tf32"])
def test_tiles_fit_the_architecture(arch: str, precision: low_rank_kernel.Precision) -> None:
    """Prefetched operands fit the shared memory: 99 KB at least, 64 KB on AMD."""
    for rows, columns in ((1, 1), (64, 100_000), (4096, 4096), (28672, 8192)):
        for out, even in itertools.product(DTYPES, (True, False)):
            cut = low_rank_kernel.tile(rows, columns, out, precision, arch, even=even)
            operands = 4 * low_rank_kernel.DEPTH * (cut.rows + cut.columns) * cut.stages
            assert operands <= (65536 if arch.startswith("gfx") else 99 << 10)
            tiles = triton.cdiv(rows, cut.rows) * triton.cdiv(columns, cut.columns)
            small = (cut.rows, cut.columns) == (64, 64)
            assert small or tiles >= 128
            assert not small or columns < 4096 or not even
    assert low_rank_kernel.supported(precision, arch) == ("ieee" if "gfx" in arch else precision)


@pytest.mark.parametrize(
    ("version", "enough"),
    [(None, False), ("3.3.1", False), ("3.4.0", True), ("3.10.0+git1", True), ("4.0", True)],
)
def test_an_old_triton_is_left_alone(
    version: str | None, enough: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "triton_version", lambda: version)
    assert launch.has_triton.__wrapped__() == enough
    assert not launch.on_kernels([torch.zeros(3)])


@pytest.fixture
def last_program(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes launches run the last of so many programs only, on tensors as they lie."""
    torch.use_deterministic_algorithms(False)
    set_dim, set_index = interpreter_builder.set_grid_dim, interpreter_builder.set_grid_idx

    def patch(programs: int) -> None:
        monkeypatch.setattr(triton, "cdiv", lambda count, block: 1)
        monkeypatch.setattr(GridExecutor, "_init_args_hst", lambda self, *given: given)
        monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda self, *given: None)
        monkeypatch.setattr(interpreter_builder, "set_grid_dim", lambda *_: set_dim(programs, 1, 1))
        monkeypatch.setattr(
            interpreter_builder, "set_grid_idx", lambda *_: set_index(programs - 1, 0, 0)
        )

    return patch


def test_entries_past_two_to_the_31(last_program: Callable[[int], None]) -> None:
    """Only the last pages of these tensors are ever touched."""
    count, rest = 2**31 + 100, 100
    base, expert = (torch.empty(count, dtype=torch.bfloat16) for _ in range(2))
    origin = torch.arange(rest) % 50
    base[-rest:], expert[-rest:] = origin, 3 * origin
    ends = {"threshold": 40.0, "cut": count - 50, "ceiling": 90.0, "ceiling_cut": count - 50}
    mask, dtype = Mask(**ends, density=0.5, key=KEY), torch.bfloat16
    expected = mask_reference.apply_mask(2.0 * origin, mask, count - rest, 1.0)

    last_program(count // (elementwise.BLOCK // 2) + 1)
    found = mask_kernel.masked_delta(base, expert, mask, out_dtype=dtype)
    assert same(found[-rest:], expected.bfloat16())
    given = {"scale": 1.0, "out_dtype": dtype}
    merged = (expected + origin).bfloat16()
    found = consensus_kernel.weighted_deltas(base, [expert], [1.0], masks=[mask], **given)
    assert same(found[-rest:], merged)
    found = consensus_kernel.elected_deltas(
        base, [expert], [1.0], elect="sum", mean=False, masks=[mask], **given
    )
    assert same(found[-rest:], merged)


def test_rows_past_two_to_the_31(last_program: Callable[[int], None]) -> None:
    rows, columns = 1 << 20, 2080
    base = torch.empty(rows, columns, dtype=torch.bfloat16)
    base[-1] = 1.0
    left, right = torch.zeros(rows, 32), torch.zeros(columns, 32)
    left[-1, 0], right[:, 0] = 1.0, torch.arange(columns)
    cut = low_rank_kernel.SMALL
    last_program(-(-rows // cut.rows) * -(-columns // cut.columns))
    given = {"scales": [1.0], "out_dtype": torch.bfloat16}
    (merged,) = low_rank_kernel.add_low_rank(base, left, right, **given)
    last = columns % cut.columns
    expected = 1.0 + torch.arange(columns)[-last:]
    assert same(merged[-1, -last:], expected.bfloat16())
