"""The kernels on a CUDA device against their references on the CPU, through the dispatchers.

`make posing` runs the same file without a GPU, on devices that the CPU poses as.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

import resm_kernels.ops.consensus as consensus
import resm_kernels.ops.delta_stats as stats
import resm_kernels.ops.low_rank as low_rank
import resm_kernels.ops.mask as mask
import resm_kernels.ops.rank_drop as rank_drop
from resm_kernels.ops.mask import Mask
from resm_kernels.ops.mask.reference import apply_mask
from tests.conftest import POSING

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DEVICE = "cuda"
SIZES = (1, 17, 4095, 4096, 4097, 9001 if POSING else 100003)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = [(BF16, FP32), (FP16, FP16), (FP32, BF16)]
"""Of the inputs and of the result."""
MASKS = {
    "none": None,
    "floor": Mask(floor=6e-4),
    "clip": Mask(clip=1e-3),
    "trim": Mask(threshold=2.0**-10, cut=2000),
    "drop": Mask(density=0.3, key=0x9E3779B97F4A7C15_F39CC0605CEDC834),
    "band": Mask(threshold=2.0**-11, cut=3000, ceiling=2.0**-9, ceiling_cut=1500),
    "all": Mask(6e-4, 2.0**-10, 3000, 4e-3, 2500, 2e-3, 0.7, 2**128 - 1, 1.3),
}
WEIGHTS = (0.3, -1.25, 1.0)
EXACT = 24 * 2.0**-24
"""Documented relative error of the sums of `delta_stats`."""


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Fresh memory is NaN, so nothing that was not written can look right."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


def family(
    shape: int | tuple[int, ...], dtype: torch.dtype, count: int = 4
) -> tuple[torch.Tensor, ...]:
    """A base and experts with unchanged entries, equal magnitudes, zeros and both infinities."""
    generator = torch.Generator().manual_seed(0)
    base = 0.02 * torch.randn(shape, generator=generator)
    changes = (1e-3 * torch.randn(shape, generator=generator) for _ in range(count - 1))
    experts = [(base + change).to(dtype) for change in changes]
    base = base.to(dtype)
    for expert in experts:
        expert.view(-1)[::7] = base.view(-1)[::7]
        expert.view(-1)[3::11] = 0.0
        expert.view(-1)[4096::4097] = math.inf
        expert.view(-1)[50000::50021] = -math.inf
    return base, *experts


def to_device(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The same, same strides and same alignment."""
    moved = []
    for tensor in tensors:
        room = torch.empty(tensor.untyped_storage().nbytes() // tensor.itemsize, dtype=tensor.dtype)
        room.copy_(tensor.as_strided(room.shape, (1,), 0))
        given = (tensor.shape, tensor.stride(), tensor.storage_offset())
        moved.append(room.to(DEVICE).as_strided(*given))
    return moved


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal bytes, any NaN for a NaN; a new dense tensor on the device."""
    assert (found.device.type, found.dtype, found.shape) == (DEVICE, expected.dtype, expected.shape)
    assert found.is_contiguous()
    ours = found.cpu()
    assert torch.equal(ours.isnan(), expected.isnan())
    integers = {2: torch.int16, 4: torch.int32}[ours.itemsize]
    unequal = ours.view(integers) != expected.view(integers)
    unequal &= ~expected.isnan()
    places = unequal.view(-1).nonzero()[:3, 0]
    assert not len(places), (places, ours.view(-1)[places], expected.view(-1)[places])


def views(dtype: torch.dtype) -> dict[str, list[torch.Tensor]]:
    """Base and experts as strided, transposed and unaligned views, with mixed dtypes last."""
    flat, wide = family(5000, dtype), family((70, 130), dtype)
    return {
        "unaligned": [x[1:] for x in flat],
        "one unaligned": [flat[0][:-1], flat[1][1:], flat[2][:-1], flat[3][:-1]],
        "every other": [x[:, ::2] for x in wide],
        "transposed": [x.T for x in wide],
        "rows": [x[3:40] for x in wide],
        "mixed": [wide[0].float(), wide[1].to(BF16), wide[2].to(FP16), wide[3]],
    }


def masked_cases(inputs: Sequence[torch.Tensor], chosen: Mask | None, dtype: torch.dtype) -> None:
    """masked_delta and split_delta of one expert; -0.0 and NaN included."""
    base, expert = inputs[:2]
    given = to_device((base, expert))
    for weight in (1.0, -0.7):
        assert_same(
            mask.masked_delta(*given, chosen, weight=weight, out_dtype=dtype),
            mask.reference.masked_delta(base, expert, chosen, weight=weight, out_dtype=dtype),
        )
        parts = mask.split_delta(*given, chosen, weight=weight)
        expected = mask.reference.split_delta(base, expert, chosen, weight=weight)
        for part, reference in zip(parts, expected, strict=True):
            assert_same(part, reference)


@pytest.mark.parametrize("chosen", MASKS)
@pytest.mark.parametrize(("dtype", "out"), DTYPES)
def test_masked_deltas_have_the_references_bytes(
    chosen: str, dtype: torch.dtype, out: torch.dtype
) -> None:
    for size in SIZES:
        masked_cases(family(size, dtype, 2), MASKS[chosen], out)


@pytest.mark.parametrize("chosen", ["none", "all"])
def test_masked_deltas_of_any_view(chosen: str) -> None:
    for inputs in views(BF16).values():
        masked_cases(inputs, MASKS[chosen], BF16)


def test_not_a_number_stays_in_sight() -> None:
    base, *experts = family(300, BF16)
    experts[0][5] = experts[1][6] = math.nan
    base[7] = -0.0
    experts[0][7] = experts[1][7] = -0.0
    base[8], experts[0][8] = 0.0, -0.0
    given = to_device((base, *experts))
    for chosen in (*MASKS.values(), Mask(threshold=0.0, cut=3), Mask(floor=math.nan)):
        if chosen is None or chosen.density == 1.0:
            assert mask.masked_delta(*given[:2], chosen)[5].isnan()
        masked_cases((base, experts[0]), chosen, BF16)
        combinations((base, *experts), chosen and [chosen] * 3, FP32)


@pytest.mark.parametrize("density", [0.0, 1e-3, 0.2, 0.5, 0.99, 1.0])
def test_trims_are_the_references(density: float) -> None:
    for dtype in (BF16, FP16, FP32):
        for size in SIZES:
            inputs = family(size, dtype)
            kept = [int(density * size), size // 3, 0]
            found = mask.trim(*split(to_device(inputs)), kept)
            assert found == mask.reference.trim(*split(inputs), kept)
    for inputs in views(BF16).values():
        kept = [int(density * inputs[0].numel()), inputs[0].numel(), 1]
        found = mask.trim(*split(to_device(inputs)), kept)
        assert found == mask.reference.trim(*split(inputs), kept)


def split(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    return tensors[0], list(tensors[1:])


def test_trims_of_equal_magnitudes_keep_the_first() -> None:
    base = torch.zeros(9000, dtype=BF16)
    experts = [torch.full_like(base, 0.5), -torch.full_like(base, 0.5), base]
    experts[1][:100] = 1.0
    found = mask.trim(*split(to_device([base, *experts])), [4500] * 3)
    assert found == mask.reference.trim(base, experts, [4500] * 3)
    assert found[:2] == [(0.5, 4500), (0.5, 4500)]


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_masked_norms_are_the_references(dtype: torch.dtype) -> None:
    """To the bit, so that a rescaled merge does not depend on the device."""
    cases = [family(size, dtype) for size in SIZES]
    for inputs in (*cases, *views(dtype).values()):
        finite = [torch.nan_to_num(x, 0.0, 0.01, -0.01) for x in inputs]
        masks = [MASKS["all"], MASKS["drop"], Mask()]
        found = mask.masked_norms(*split(to_device(finite)), masks)
        assert found == mask.reference.masked_norms(*split(finite), masks)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_drops_by_rank_are_the_references(dtype: torch.dtype) -> None:
    given = {"density": 0.4, "epsilon": 0.3, "key": 2**128 - 5}
    cases = [family(size, dtype, 2) for size in (*SIZES, (70, 130), (5, 4099))]
    for inputs in (*cases, *views(dtype).values()):
        base, expert = inputs[:2]
        expected = rank_drop.reference.rank_drop(base, expert, **given)
        assert_same(rank_drop.rank_drop(*to_device((base, expert)), **given), expected)


def combinations(
    inputs: Sequence[torch.Tensor], masks: Sequence[Mask] | None, out: torch.dtype
) -> None:
    """weighted_deltas, and elections by sum and by count, with sums and with means."""
    base, experts = split(inputs)
    given, moved = split(to_device(inputs))
    options: dict[str, Any] = {"out_dtype": out, "masks": masks}
    found = consensus.weighted_deltas(given, moved, WEIGHTS, scale=0.9, divisor=3.0, **options)
    reference = consensus.reference
    expected = reference.weighted_deltas(base, experts, WEIGHTS, scale=0.9, divisor=3.0, **options)
    assert_same(found, expected)
    for elect, mean in (("sum", True), ("count", False)):
        options |= {"elect": elect, "mean": mean, "scale": 0.7}
        assert_same(
            consensus.elected_deltas(given, moved, WEIGHTS, **options),
            reference.elected_deltas(base, experts, WEIGHTS, **options),
        )


@pytest.mark.parametrize("chosen", ["none", "floor", "trim", "drop", "band", "all"])
@pytest.mark.parametrize(("dtype", "out"), DTYPES)
def test_combinations_have_the_references_bytes(
    chosen: str, dtype: torch.dtype, out: torch.dtype
) -> None:
    every = MASKS[chosen]
    for size in SIZES:
        masks = every and [every, Mask(), Mask(clip=1e-3)]
        combinations(family(size, dtype), masks, out)


@pytest.mark.parametrize("chosen", ["none", "all"])
def test_combinations_of_any_view(chosen: str) -> None:
    for inputs in views(BF16).values():
        combinations(inputs, MASKS[chosen] and [MASKS[chosen]] * 3, BF16)


def test_means_over_vanishing_weights_stay_sums() -> None:
    base, *experts = family(1000, FP32)
    given = {"elect": "sum", "mean": True, "scale": 1.0, "out_dtype": FP32}
    weights = (1e-9, 2e-9, -1e-9)
    assert_same(
        consensus.elected_deltas(*split(to_device((base, *experts))), weights, **given),
        consensus.reference.elected_deltas(base, experts, weights, **given),
    )


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("dtype", "out"), DTYPES)
def test_weighted_sums_err_by_an_ulp(dtype: torch.dtype, out: torch.dtype, normalize: bool) -> None:
    weights = (0.3, 0.5, -0.1, 1.25)
    cases = [list(family(size, dtype)) for size in SIZES]
    for inputs in (*cases, *views(dtype).values()):
        found = consensus.weighted_sum(
            to_device(inputs), weights, out_dtype=out, normalize=normalize
        )
        expected = consensus.reference.weighted_sum(
            inputs, weights, out_dtype=out, normalize=normalize
        )
        assert found.is_contiguous()
        assert (found.dtype, found.shape) == (out, expected.shape)
        ours, theirs = found.cpu(), expected
        finite = theirs.isfinite()
        assert torch.equal(ours.isfinite(), finite)
        # Multiplication and addition apart, as on a CPU without fused ones, round three times more.
        terms = sum(abs(w) * x.double().abs() for w, x in zip(weights, inputs, strict=True))
        slack = 3 * 2.0**-24 * terms / (abs(sum(weights)) if normalize else 1.0)
        ulp = (torch.nextafter(theirs, theirs.new_full((), math.inf)) - theirs).double()
        assert bool(((ours.double() - theirs.double()).abs() <= ulp + slack)[finite].all())


def test_quotients_of_float64_are_rounded_once() -> None:
    inputs = [torch.randn(999, dtype=torch.float64) for _ in range(4)]
    given = {"scale": 0.9, "divisor": 3.0, "out_dtype": torch.float64}
    found = consensus.weighted_deltas(*split(to_device(inputs)), WEIGHTS, **given)
    expected = consensus.reference.weighted_deltas(*split(inputs), WEIGHTS, **given)
    assert torch.equal(found.cpu(), expected)


def near(magnitudes: torch.Tensor, limit: float) -> int:
    """Entries so close to a limit that its rounding decides on which side they are."""
    return int(((magnitudes - limit).abs() <= 4 * EXACT * limit).sum())


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_delta_stats_keep_their_error_bound(dtype: torch.dtype) -> None:
    cases = [family(size, dtype) for size in SIZES]
    for inputs in (*cases, *views(dtype).values()):
        base, experts = split([torch.nan_to_num(x, 0.0, 0.01, -0.01) for x in inputs])
        options = {"sigma": 2.0, "noise_floor": 0.5}
        found = stats.delta_stats(*split(to_device([base, *experts])), **options)
        expected = stats.reference.delta_stats(base, experts, **options)
        for ours, theirs, expert in zip(found, expected, experts, strict=True):
            a = (expert.float() - base.float()).abs().double()
            assert (ours.count, ours.largest) == (theirs.count, theirs.largest)
            assert ours.zero_count == theirs.zero_count
            for name in ("abs_sum", "square_sum", "threshold", "floor"):
                assert getattr(ours, name) == pytest.approx(getattr(theirs, name), rel=EXACT)
            beside = near(a, theirs.threshold)
            assert abs(ours.outlier_count - theirs.outlier_count) <= beside
            assert abs(ours.sparse_count - theirs.sparse_count) <= near(a, theirs.floor)
            moved = beside * theirs.threshold * 1.001
            assert abs(ours.outlier_mass - theirs.outlier_mass) <= (
                EXACT * theirs.outlier_mass + moved
            )


@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1e18, 1e37])
def test_delta_stats_at_the_ends_of_the_range(scale: float) -> None:
    base = torch.zeros(5000)
    expert = torch.randn(5000, generator=torch.Generator().manual_seed(0)) * scale
    (ours,) = stats.delta_stats(*split(to_device([base, expert])))
    a = expert.abs().double()
    assert ours.abs_sum == pytest.approx(float(a.sum()), rel=EXACT)
    assert ours.square_sum == pytest.approx(float(a.square().sum()), rel=EXACT)
    assert ours.largest == float(a.max())


UNITS = {"tf32x3": 2.0**-19, "ieee": 2.0**-24, "tf32": 2.0**-9}
"""Documented relative error of a product, by precision."""
PRODUCTS = [
    (1, 1, 1),
    (17, 33, 5),
    (64, 64, 32),
    (130, 70, 33),
    (256, 384, 96),
    (1500, 1537, 65),
    (1536, 1552, 64),
]


@pytest.mark.parametrize("precision", UNITS)
@pytest.mark.parametrize(("rows", "columns", "depth"), PRODUCTS)
def test_reconstructions_keep_their_error_bound(
    rows: int, columns: int, depth: int, precision: low_rank.Precision
) -> None:
    if POSING and rows > 1000:
        pytest.skip("minutes in the interpreter")
    generator = torch.Generator().manual_seed(0)
    # All positive: what is cut off adds up.
    left, right = (torch.rand(side, depth, generator=generator) for side in (rows, columns))
    values = torch.rand(depth, generator=generator)
    base = torch.randn(rows, columns, generator=generator).to(BF16)
    scales = (0.9, 0.0, -2.0)
    for given, out in ((None, FP32), (values, BF16)):
        moved = None if given is None else given.to(DEVICE)
        found = low_rank.add_low_rank(
            *to_device((base, left, right)),
            scales=scales,
            out_dtype=out,
            values=moved,
            precision=precision,
        )
        exact = (left if given is None else left * given).double() @ right.double().T
        for result, scale in zip(found, scales, strict=True):
            assert (result.dtype, result.shape, result.device.type) == (out, base.shape, DEVICE)
            assert result.is_contiguous()
            expected = base.double() + scale * exact
            # Products are positive, so theirs is the sum of their magnitudes; values round too.
            bound = abs(scale) * exact * (UNITS[precision] + (depth + 2) * 2.0**-23)
            bound += expected.abs() * (2.0**-23 if out == FP32 else 2.0**-8)
            assert bool(((result.cpu().double() - expected).abs() <= bound).all())


def test_reconstructions_of_any_view() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(40, side, generator=generator).T for side in (70, 130))
    wide = torch.randn(70, 260, generator=generator).to(BF16)
    tall = torch.randn(130, 70, generator=generator)
    for base in (wide[:, ::2], wide[:, 1:131], wide[:, :130], tall.T, wide[:, 16:146].float()):
        (found,) = low_rank.add_low_rank(
            *to_device((base, left, right)), scales=(0.5,), out_dtype=FP32, precision="ieee"
        )
        expected = base.double() + 0.5 * (left.double() @ right.double().T)
        bound = left.double().abs() @ right.double().abs().T * 42 * 2.0**-23 + 1e-6
        assert bool(((found.cpu().double() - expected).abs() <= bound).all())


def test_a_result_does_not_depend_on_the_other_scales() -> None:
    given = to_device([torch.randn(130, 70), torch.randn(130, 33), torch.randn(70, 33)])
    several = low_rank.add_low_rank(*given, scales=(0.1, 0.5, 2.0), out_dtype=BF16)
    (alone,) = low_rank.add_low_rank(*given, scales=(0.5,), out_dtype=BF16)
    assert torch.equal(several[1], alone)
    assert low_rank.add_low_rank(*given, scales=(), out_dtype=BF16) == []


def every_op(base: torch.Tensor, experts: list[torch.Tensor]) -> list[object]:
    """One call of everything that is dispatched, on 2-D inputs."""
    chosen = [MASKS["all"]] * len(experts)
    out = base.dtype
    left, right = (torch.ones(side, 40, device=base.device) for side in base.shape)
    elected = {"elect": "sum", "mean": True, "scale": 1.0, "out_dtype": out, "masks": chosen}
    weights = WEIGHTS[: len(experts)]
    return [
        stats.delta_stats(base, experts),
        mask.masked_delta(base, experts[0], chosen[0]),
        *mask.split_delta(base, experts[0], chosen[0]),
        mask.trim(base, experts, [base.numel() // 3] * len(experts)),
        mask.masked_norms(base, experts, chosen),
        rank_drop.rank_drop(base, experts[0], density=0.5, epsilon=0.2, key=9),
        consensus.weighted_sum(experts, weights, out_dtype=out),
        consensus.weighted_deltas(base, experts, weights, scale=1.0, out_dtype=out, masks=chosen),
        consensus.elected_deltas(base, experts, weights, **elected),
        *low_rank.add_low_rank(base, left, right, scales=(1.0, 0.5), out_dtype=out),
    ]


def assert_equal(first: list[object], second: list[object]) -> None:
    for ours, theirs in zip(first, second, strict=True):
        if isinstance(ours, torch.Tensor):
            assert isinstance(theirs, torch.Tensor)
            integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[ours.itemsize]
            assert torch.equal(ours.view(integers), theirs.view(integers))
        else:
            assert ours == theirs


def small_family() -> list[torch.Tensor]:
    return [torch.nan_to_num(x, 0.0, 0.01, -0.01) for x in family((70, 130), BF16)]


def test_two_runs_give_the_same_bytes() -> None:
    base, experts = split(to_device(small_family()))
    assert_equal(every_op(base, experts), every_op(base, experts))


def test_modes_of_torch_change_no_bytes() -> None:
    base, experts = split(to_device(small_family()))
    expected = every_op(base, experts)
    with torch.inference_mode():
        assert_equal(every_op(base, experts), expected)
    with torch.autocast(DEVICE, dtype=BF16):
        assert_equal(every_op(base, experts), expected)
    with torch.device("meta"):  # where tensors lie that are given no device
        assert_equal(every_op(base, experts), expected)
    base.requires_grad_()
    with torch.no_grad():
        assert_equal(every_op(base, experts), expected)


def test_what_the_kernels_do_not_take_goes_to_the_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from resm_kernels.ops import elementwise
    from resm_kernels.ops.low_rank import kernel

    def refuse(*given: object, **options: object) -> None:
        raise AssertionError("a kernel ran")

    monkeypatch.setattr(elementwise, "launch", refuse)
    for name in ("consensus", "delta_stats", "mask"):
        monkeypatch.setattr(f"resm_kernels.ops.{name}.kernel.launch", refuse)
    monkeypatch.setattr(kernel, "add_low_rank", refuse)
    for shape, dtype in (((0, 5), BF16), ((70, 130), torch.float64)):
        base = torch.zeros(shape, dtype=dtype, device=DEVICE)
        for result in every_op(base, [base + 1.0, base - 1.0, base]):
            if isinstance(result, torch.Tensor):
                assert (result.device.type, result.shape) == (DEVICE, shape)
    base, *experts = to_device(small_family())
    with pytest.raises(AssertionError, match="a kernel ran"):
        mask.masked_delta(base, experts[0])


def test_streams_do_not_meet() -> None:
    times = 1 if POSING else 20
    base, experts = split(to_device([x.repeat(times, times) for x in small_family()]))
    expected = every_op(base, experts)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(3)]
    found = []
    for stream in streams * 3:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            found.append(every_op(base, experts))
    torch.cuda.synchronize()
    for results in found:
        assert_equal(results, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_kernels_run_where_their_tensors_are() -> None:
    base, experts = split([x.to("cuda:1") for x in small_family()])
    found = every_op(base, experts)
    with torch.cuda.device(1):
        assert_equal(every_op(base, experts), found)
    assert base.device == torch.device("cuda:1")


def test_places_past_two_to_the_31() -> None:
    count = 2**31 + 4099
    if torch.cuda.mem_get_info()[0] < 22e9:
        pytest.skip("needs 22 GB of free memory")
    torch.use_deterministic_algorithms(False)
    generator = torch.Generator(DEVICE).manual_seed(0)
    base = torch.empty(count, dtype=BF16, device=DEVICE).normal_(0.0, 0.02, generator=generator)
    expert = torch.empty_like(base).normal_(0.0, 0.02, generator=generator)
    ends = {"threshold": 2.0**-7, "cut": 2**31 + 100, "ceiling": 0.05, "ceiling_cut": 2**31}
    chosen = Mask(1e-3, **ends, clip=0.03, density=0.5, key=77)
    places = [slice(0, 5000), slice(2**31 - 5000, 2**31 + 4000), slice(count - 5000, count)]

    def check(found: torch.Tensor, scale: float, with_base: bool) -> None:
        for place in places:
            origin = base[place].cpu().float()
            delta = apply_mask(expert[place].cpu().float() - origin, chosen, place.start, 0.5)
            expected = (delta * scale + origin if with_base else delta).to(BF16)
            assert torch.equal(found[place].cpu(), expected)

    check(mask.masked_delta(base, expert, chosen, weight=0.5, out_dtype=BF16), 1.0, False)
    given = {"scale": 0.9, "out_dtype": BF16, "masks": [chosen]}
    check(consensus.weighted_deltas(base, [expert], (0.5,), **given), 0.9, True)
    elected = {"elect": "sum", "mean": False, **given}
    check(consensus.elected_deltas(base, [expert], (0.5,), **elected), 0.9, True)
    (found,) = stats.delta_stats(base, [expert])
    assert (found.count, found.zero_count > 0) == (count, True)
    ((threshold, cut),) = mask.trim(base, [expert], [int(0.25 * count)])
    at_most, above = 0, 0
    for piece in range(0, count, 2**28):
        a = (expert[piece : piece + 2**28].float() - base[piece : piece + 2**28].float()).abs_()
        above += int((a > threshold).sum())
        at_most += int((a[: max(cut - piece, 0)] == threshold).sum())
    assert above + at_most == int(0.25 * count)
