"""Points between models: Model Stock, spherical interpolation, and one model as it is.

Parameters, defaults and rules are those of mergekit 0.1.5.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from resm_kernels.errors import UsageError
from resm_kernels.methods.arithmetic import chunk_workspace
from resm_kernels.methods.base import Merged, Method, model_option, never_declines, option
from resm_kernels.methods.inputs import Inputs
from resm_kernels.ops.consensus import weighted_deltas, weighted_sum
from resm_kernels.ops.dtypes import chunk_on, chunks, planned_chunk, scratch
from resm_kernels.ops.gram import gram

COLLINEAR = 0.9995
"""Vectors whose cosine passes this are interpolated linearly."""
LEAST_NORM = 1e-8
"""A shorter vector of `slerp` is not normalised."""
LEAST_PRODUCT = 1e-6
"""Smallest product of norms that a cosine is taken with."""


@dataclass(frozen=True)
class ModelStockOptions:
    """Options of `model_stock`."""

    filter_wise: bool = option(False, "an interpolation ratio for every row, not for every tensor")


@dataclass(frozen=True)
class SlerpOptions:
    """Options of `slerp`."""

    t: float = option(0.5, "0 is the base, 1 the other model")


@dataclass(frozen=True)
class PassthroughOptions:
    """Options of `passthrough`."""

    scale: tuple[float, ...] = model_option(1.0, "multiplies the model's weights")


def gram_workspace(
    shape: Sequence[int], experts: int, itemsize: int, options: object, device: str
) -> int:
    """Bytes of temporaries: a chunk of float64 deltas and products, and the ratios of all rows."""
    rows = math.prod(shape[:-1]) if getattr(options, "filter_wise", False) else 1
    products = 8 * 8 * max(planned_chunk(shape, device), experts * experts)
    deltas = 2 * 8 * (experts + 1) * planned_chunk(shape, device)
    return products + deltas + 2 * 8 * rows + chunk_workspace(shape, experts, 8, options, device)


def _model_stock(
    inputs: Inputs,
    weights: Sequence[float],
    options: ModelStockOptions,
    out_dtype: torch.dtype,
) -> Merged:
    base, experts, count = inputs.base, inputs.whole(), len(weights)
    by_row = options.filter_wise and base.dim() > 1 and base.numel() > 0
    columns = base.shape[-1] if by_row else base.numel()
    flat = [tensor.reshape(-1 if by_row else 1, columns) for tensor in (base, *experts)]
    ratios = inputs.once("ratios", options.filter_wise, lambda: _ratios_of(flat))
    if by_row:
        tensor = _row_by_row(flat, ratios, inputs.dtype, out_dtype).view(base.shape)
    else:
        tensor = weighted_deltas(
            base,
            experts,
            [1.0] * count,
            scale=float(ratios),
            divisor=float(count),
            out_dtype=out_dtype,
        )
    return Merged(tensor, "model_stock")


def _ratios_of(matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    """The ratio of every row of base and experts, some rows at a time: float64 [R]."""
    rows, columns = matrices[0].shape
    size = chunk_on(matrices[0].device.type) // max(columns, len(matrices) ** 2)
    found = []
    for lines in chunks(rows, max(1, size)):
        base, *experts = (matrix[lines] for matrix in matrices)
        found.append(_ratios(gram(experts, base=base, columns=columns)))
    return torch.cat(found)


def _ratios(products: torch.Tensor) -> torch.Tensor:
    """t = T c / (1 + (T - 1) c) from the mean c of the cosines between deltas: [R, T, T] -> [R].

    0 where the denominator vanishes; NaN, and a result that is refused, where a square overflows.
    """
    count = products.shape[-1]
    norms = products.diagonal(dim1=-2, dim2=-1).sqrt()
    lengths = (norms[:, :, None] * norms[:, None, :]).clamp_min(LEAST_PRODUCT)
    cosines = (products / lengths).clamp(-1.0, 1.0).masked_fill_(lengths.isinf(), math.nan)
    first, second = torch.triu_indices(count, count, 1)
    mean = cosines[:, first, second].mean(-1)
    denominator = 1.0 + (count - 1) * mean
    singular = denominator.abs() < 1e-6
    return torch.where(singular, 0.0, count * mean / denominator.masked_fill(singular, 1.0))


def _row_by_row(
    matrices: Sequence[torch.Tensor],
    ratios: torch.Tensor,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """W_0 + t_r * mean_t D_t of base and experts, with a ratio for every row."""
    rows, columns = matrices[0].shape
    size = chunk_on(ratios.device.type)
    out = torch.empty(rows, columns, dtype=out_dtype, device=ratios.device)
    factors = ratios.to(dtype)[:, None]
    for lines in chunks(rows, max(1, size // columns)):
        for part in chunks(columns, size):
            origin, *others = (matrix[lines, part] for matrix in matrices)
            origin = origin.to(dtype)
            total = torch.zeros_like(origin)
            for other in others:
                total.add_(other.to(dtype).sub(origin))
            total.div_(total.new_full((), len(others)))
            out[lines, part] = total.mul_(factors[lines]).add_(origin)
    return out


def _slerp(
    inputs: Inputs, weights: Sequence[float], options: SlerpOptions, out_dtype: torch.dtype
) -> Merged:
    base, (expert,) = inputs.base, inputs.whole()

    def find() -> torch.Tensor:
        return gram((base, expert), columns=base.numel())

    (own, dot), (_, other) = inputs.once("products", None, find)[0].tolist()
    lengths = [math.sqrt(square) for square in (own, other)]
    lengths = [length if length > LEAST_NORM else 1.0 for length in lengths]
    cosine = min(max(dot / lengths[0] / lengths[1], -1.0), 1.0)
    if math.inf in lengths:  # the squares overflow: no angle, and a result that is refused
        cosine = math.nan
    shares = [1.0 - options.t, options.t]
    if not abs(cosine) > COLLINEAR:
        angle = math.acos(cosine)
        shares = [math.sin(share * angle) / math.sin(angle) for share in shares]
    return Merged(weighted_sum((base, expert), shares, out_dtype=out_dtype), "slerp")


def _passthrough(
    inputs: Inputs, weights: Sequence[float], options: PassthroughOptions, out_dtype: torch.dtype
) -> Merged:
    (tensor,), (scale,) = inputs.whole(), options.scale
    out = torch.empty(tensor.shape, dtype=out_dtype, device=tensor.device)
    flat, buffer = tensor.reshape(-1), scratch(tensor.numel(), tensor, inputs.dtype)
    for piece in chunks(tensor.numel(), chunk_on(tensor.device.type)):
        value = buffer[: piece.stop - piece.start].copy_(flat[piece])
        out.view(-1)[piece] = value.mul_(scale)
    return Merged(out, "passthrough")


def _unweighted(name: str, instead: str) -> Callable[[Sequence[float], object], None]:
    """The check that nobody gave weights to a method which does not look at them."""

    def validate(weights: Sequence[float], options: object) -> None:
        if any(weight != 1.0 for weight in weights):
            raise UsageError(
                f"{name} takes no weights", got=f"weights {list(weights)}", fix=instead
            )

    return validate


MODEL_STOCK = Method(
    name="model_stock",
    summary="between the base and the mean of the experts, by the angle between their changes",
    formula="W_0 + t * mean_t D_t, t = T c / (1 + (T - 1) c), c the mean cosine of pairs of D_t",
    source="Model Stock, arXiv 2403.19522",
    options=ModelStockOptions,
    merge=_model_stock,
    workspace=gram_workspace,
    declines=never_declines,
    validate=_unweighted("model_stock", "leave them out"),
    experts=(2, None),
)

SLERP = Method(
    name="slerp",
    summary="spherical interpolation between the base and one model",
    formula="sin((1 - t) a) / sin(a) W_0 + sin(t a) / sin(a) W_1, a the angle between W_0 and W_1",
    source="Shoemake 1985",
    options=SlerpOptions,
    merge=_slerp,
    workspace=gram_workspace,
    declines=never_declines,
    validate=_unweighted("slerp", "leave them out, and set t"),
    experts=(1, 1),
)

PASSTHROUGH = Method(
    name="passthrough",
    summary="one model as it is, or scaled",
    formula="scale * W_1",
    source="mergekit",
    options=PassthroughOptions,
    merge=_passthrough,
    workspace=chunk_workspace,
    declines=never_declines,
    uses_base=False,
    keeps_base=lambda weights, options: options.scale == (1.0,),
    validate=_unweighted("passthrough", "leave them out, and set scale"),
    experts=(1, 1),
)
