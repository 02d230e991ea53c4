"""Sparsified task vectors: TIES, DARE, DELLA and Breadcrumbs, with and without a sign election.

Parameters, defaults and rules are those of mergekit 0.1.5. `rescale` therefore restores sum |D| of
every expert, where the papers of DARE and DELLA divide by the probability of keeping an entry: the
factor depends on what was drawn, and is close to theirs for large tensors.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from resm_kernels.errors import UsageError
from resm_kernels.methods.arithmetic import divisor_of
from resm_kernels.methods.base import Merged, Method, model_option, never_declines, option
from resm_kernels.methods.inputs import Inputs
from resm_kernels.ops.consensus import elected_deltas, weighted_deltas
from resm_kernels.ops.dtypes import planned_chunk
from resm_kernels.ops.mask import Mask, drop_key, masked_norms, trim
from resm_kernels.ops.rank_drop import rank_drop

NOTHING = Mask(threshold=math.inf, cut=0)
"""Keeps no entry."""
LEAST_NORM = 1e-7
"""Norms below this are not restored."""
LARGEST_SEED = 2**32 - 1


@dataclass(frozen=True)
class SparseOptions:
    """Options of every method of this family."""

    density: tuple[float, ...] = model_option(
        1.0, "share of a delta's entries that is kept; none at or below 0, all at or above 1"
    )
    lambda_: float = option(1.0, "merge coefficient that multiplies the combined delta")
    normalize: bool = option(False, "divide by the sum of the weights that take part")
    rescale: bool = option(False, "restore each delta's sum of magnitudes after sparsifying")
    int8_mask: bool = option(False, "accepted for mergekit's recipes; no effect: no signs are kept")


@dataclass(frozen=True)
class TiesOptions(SparseOptions):
    """Options of `ties`."""

    normalize: bool = option(True, "divide by the sum of the weights that take part")


@dataclass(frozen=True)
class BreadcrumbsOptions(SparseOptions):
    """Options of `breadcrumbs` and `breadcrumbs_ties`."""

    gamma: tuple[float, ...] = model_option(
        0.01, "share of a delta's largest entries that is taken out", low=0, high=1
    )


@dataclass(frozen=True)
class DareOptions(SparseOptions):
    """Options of `dare_linear` and `dare_ties`."""

    rescale: bool = option(True, "restore each delta's sum of magnitudes after sparsifying")
    seed: int = option(0, "fixes the random drops", low=0, high=LARGEST_SEED)


@dataclass(frozen=True)
class DellaLinearOptions(DareOptions):
    """Options of `della_linear`."""

    epsilon: tuple[float, ...] = model_option(
        0.15,
        "the largest entry of a row is kept with density + epsilon, the smallest - epsilon",
        low=0,
    )


@dataclass(frozen=True)
class DellaOptions(DellaLinearOptions):
    """Options of `della`."""

    normalize: bool = option(True, "divide by the sum of the weights that take part")


Sparsified = tuple[Sequence[torch.Tensor], list[Mask]]
"""Experts, and what of their deltas is kept."""


def sparse_workspace(
    shape: Sequence[int], experts: int, itemsize: int, options: object, device: str
) -> int:
    """Bytes of temporaries of a chunked election, and of the counting before it."""
    return 16 * planned_chunk(shape, device) * itemsize


def ranked_workspace(
    shape: Sequence[int], experts: int, itemsize: int, options: object, device: str
) -> int:
    """The same, a copy of every expert, and the sort of a chunk of rows."""
    entries, row = math.prod(shape), shape[-1] if shape else 1
    sorting = 48 * max(planned_chunk(shape, device), row) + (0 if device == "cpu" else 4 * entries)
    copies = experts * itemsize * entries
    return copies + sorting + sparse_workspace(shape, experts, itemsize, options, device)


def _trimmed(inputs: Inputs, options: SparseOptions) -> Sparsified:
    count, experts = inputs.base.numel(), inputs.whole()
    # At least one entry where the density is positive.
    kept = [min(count, max(1, int(d * count))) if d > 0.0 else 0 for d in options.density]
    found = trim(inputs.base, experts, kept)
    return experts, [Mask(threshold=threshold, cut=cut) for threshold, cut in found]


def _banded(inputs: Inputs, options: BreadcrumbsOptions) -> Sparsified:
    count, experts = inputs.base.numel(), inputs.whole()
    kept = [min(count, max(0, int(density * count))) for density in options.density]
    # What is taken out gives way to what is kept.
    taken = [
        min(int(gamma * count), count - number)
        for gamma, number in zip(options.gamma, kept, strict=True)
    ]
    ends = [number + above for number, above in zip(kept, taken, strict=True)]
    found = trim(inputs.base, [*experts, *experts], [*ends, *taken])
    masks = [
        Mask(threshold=threshold, cut=cut, ceiling=ceiling, ceiling_cut=ceiling_cut)
        for (threshold, cut), (ceiling, ceiling_cut) in zip(
            found[: len(experts)], found[len(experts) :], strict=True
        )
    ]
    return experts, masks


def _dropped(inputs: Inputs, options: DareOptions) -> Sparsified:
    keys = _keys(inputs, options)
    return inputs.whole(), [
        Mask(density=min(density, 1.0), key=key, rescale=1.0) if density > 0.0 else NOTHING
        for density, key in zip(options.density, keys, strict=True)
    ]


def _ranked(inputs: Inputs, options: DellaLinearOptions) -> Sparsified:
    given = zip(
        inputs.whole(), options.density, options.epsilon, _keys(inputs, options), strict=True
    )
    experts = [
        rank_drop(inputs.base, expert, density=density, epsilon=epsilon, key=key)
        if 0.0 < density < 1.0
        else expert
        for expert, density, epsilon, key in given
    ]
    return experts, [Mask() if density > 0.0 else NOTHING for density in options.density]


def _keys(inputs: Inputs, options: DareOptions) -> list[int]:
    return [drop_key(options.seed, inputs.name, t) for t in range(len(options.density))]


def _rescaled(inputs: Inputs, experts: Sequence[torch.Tensor], masks: list[Mask]) -> list[Mask]:
    """The masks with the factors that restore sum |D|."""
    norms = masked_norms(inputs.base, experts, masks)
    after = [norm for _, norm in norms]
    if any(ours is not given for ours, given in zip(experts, inputs.whole(), strict=True)):
        norms = masked_norms(inputs.base, inputs.whole(), [Mask()] * len(masks))
    return [
        replace(mask, rescale=whole / left if min(whole, left) >= LEAST_NORM else 1.0)
        for mask, (whole, _), left in zip(masks, norms, after, strict=True)
    ]


def _merge(
    inputs: Inputs,
    weights: Sequence[float],
    options: Any,
    out_dtype: torch.dtype,
    *,
    rule: str,
    sparsify: Callable[[Inputs, Any], Sparsified],
    elect: bool,
) -> Merged:
    def find() -> Sparsified:
        experts, masks = sparsify(inputs, options)
        return experts, _rescaled(inputs, experts, masks) if options.rescale else masks

    key = replace(options, lambda_=1.0, normalize=False, int8_mask=False)
    experts, masks = inputs.once("sparsified", key, find)
    if elect:
        tensor = elected_deltas(
            inputs.base,
            experts,
            weights,
            elect="sum",
            mean=options.normalize,
            scale=options.lambda_,
            out_dtype=out_dtype,
            masks=masks,
        )
    else:
        tensor = weighted_deltas(
            inputs.base,
            experts,
            weights,
            scale=options.lambda_,
            divisor=divisor_of(weights, options.normalize),
            out_dtype=out_dtype,
            masks=masks,
        )
    return Merged(tensor, rule, weights=tuple(weights))


def _validate_ranked(weights: Sequence[float], options: DellaLinearOptions) -> None:
    wrong = [
        f"expert {t + 1}: density {density:g}, epsilon {epsilon:g}"
        for t, (density, epsilon) in enumerate(zip(options.density, options.epsilon, strict=True))
        if 0.0 < density < 1.0 and not (epsilon < density and density + epsilon < 1.0)
    ]
    if wrong:
        raise UsageError(
            "della: probabilities outside (0, 1)",
            got="; ".join(wrong),
            expected="0 < density - epsilon and density + epsilon < 1, or density 0 or 1",
            fix="a smaller epsilon",
        )


def _method(
    name: str,
    summary: str,
    formula: str,
    source: str,
    options: type[Any],
    sparsify: Callable[[Inputs, Any], Sparsified],
    elect: bool,
) -> Method[Any]:
    ranked = sparsify is _ranked
    return Method(
        name=name,
        summary=summary,
        formula=formula,
        source=source,
        options=options,
        merge=functools.partial(_merge, rule=name, sparsify=sparsify, elect=elect),
        workspace=ranked_workspace if ranked else sparse_workspace,
        declines=never_declines,
        validate=_validate_ranked if ranked else lambda weights, options: None,
    )


SUM = "W_0 + lambda * sum_t w_t {}"
ELECTED = "W_0 + lambda * mean of the w_t {} of the sign that their sum has"

SPARSIFYING = (
    _method(
        "ties",
        "task vectors trimmed to their largest entries, merged where their signs agree",
        ELECTED.format("trim_density(D_t)"),
        "TIES-Merging, arXiv 2306.01708",
        TiesOptions,
        _trimmed,
        elect=True,
    ),
    _method(
        "dare_linear",
        "task arithmetic over task vectors whose entries are dropped at random",
        SUM.format("drop_density(D_t)"),
        "DARE, arXiv 2311.03099",
        DareOptions,
        _dropped,
        elect=False,
    ),
    _method(
        "dare_ties",
        "entries dropped at random, merged where signs agree",
        ELECTED.format("drop_density(D_t)"),
        "DARE, arXiv 2311.03099",
        DareOptions,
        _dropped,
        elect=True,
    ),
    _method(
        "della_linear",
        "task arithmetic over task vectors whose small entries are dropped more often",
        SUM.format("drop_rank(D_t)"),
        "DELLA, arXiv 2406.11617",
        DellaLinearOptions,
        _ranked,
        elect=False,
    ),
    _method(
        "della",
        "small entries dropped more often, merged where signs agree",
        ELECTED.format("drop_rank(D_t)"),
        "DELLA, arXiv 2406.11617",
        DellaOptions,
        _ranked,
        elect=True,
    ),
    _method(
        "breadcrumbs",
        "task arithmetic over task vectors without their largest and smallest entries",
        SUM.format("band(D_t)"),
        "Model Breadcrumbs, arXiv 2312.06795",
        BreadcrumbsOptions,
        _banded,
        elect=False,
    ),
    _method(
        "breadcrumbs_ties",
        "largest and smallest entries taken out, merged where signs agree",
        ELECTED.format("band(D_t)"),
        "Model Breadcrumbs, arXiv 2312.06795",
        BreadcrumbsOptions,
        _banded,
        elect=True,
    ),
)
