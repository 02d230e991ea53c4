"""What a merge did, tensor by tensor and in all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from resm_kernels.errors import VerificationError


@dataclass(frozen=True)
class Measures:
    """What a merge did to the deltas of one weight, to four digits.

    Attributes
    ----------
    base_norm, merged_norm : float
        ||W_0||_F and ||M||_F, where M = W - W_0 for the weight W as it was stored.
    delta_norms : tuple of float
        ||D_t||_F per expert.
    retentions : tuple of float or None
        <M, D_t> / ||D_t||_F^2 per expert; None where D_t = 0.
    cosines : tuple of float
        <D_t, D_u> / (||D_t||_F ||D_u||_F) for every pair t < u of experts.
    interference, overlaps
        As in `linalg.Overlap`; the pairs in the order of `cosines`.
    spectrum_at : tuple of int
        Places of the singular values in `spectra`, from 1.
    spectra : tuple of tuple of float
        Per expert, kept singular values at these places, as far as its rank goes.
    """

    base_norm: float
    merged_norm: float
    delta_norms: tuple[float, ...]
    retentions: tuple[float | None, ...]
    cosines: tuple[float, ...] = ()
    interference: float | None = None
    overlaps: tuple[float, ...] = ()
    spectrum_at: tuple[int, ...] = ()
    spectra: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True)
class TensorResult:
    """What was done to one tensor.

    Attributes
    ----------
    rule, reason : str
        As in `PlannedTensor`.
    matrices : str or None
        The matrices in it that were merged one by one, such as `q, k, v`.
    ranks, weights, outlier_scores : tuple
        Per expert, matrix by matrix; empty where they have no meaning.
    sparsity : float or None
        Share of entries at or below the noise floor, mean over experts.
    backends, notes : tuple of str
        Factorisations that ran; every clamp, fallback and warning, in words.
    seconds : float
        Compute time, in seconds of one worker.
    measures : Measures or None
        For the report; no part of the facts.
    memory_notes : tuple of str
        What was given up because a device ran out of memory; no part of the facts either.
    """

    name: str
    rule: str
    reason: str | None
    shape: tuple[int, ...]
    matrices: str | None = None
    ranks: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()
    outlier_scores: tuple[float, ...] = ()
    sparsity: float | None = None
    backends: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    measures: Measures | None = None
    memory_notes: tuple[str, ...] = ()

    def facts(self) -> dict[str, Any]:
        """The fields that are the same in every run of one plan; empty ones left out."""
        timed = ("seconds", "measures", "memory_notes")
        return {k: v for k, v in asdict(self).items() if v not in ((), None) and k not in timed}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> TensorResult:
        """Read what `asdict` and a round through JSON made of a result."""
        try:
            values = {k: _frozen(v) for k, v in content.items()}
            if values.get("measures") is not None:
                values["measures"] = Measures(**values["measures"])
            return cls(**values)
        except (AttributeError, TypeError) as error:
            raise VerificationError(f"not the result of a tensor: {error}") from error


def _frozen(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(map(_frozen, value))
    return {k: _frozen(v) for k, v in value.items()} if isinstance(value, dict) else value


@dataclass(frozen=True)
class Usage:
    """What a run took; the fields of the same names in `MergeReport` say what they are."""

    stage_seconds: dict[str, float]
    timeline: dict[str, list[float]]
    peak_memory: int
    predicted_memory: int
    peak_device_memory: dict[str, int]
    predicted_device_memory: int
    cluster: dict[str, Any] | None = None


@dataclass
class MergeReport:
    """What a merge did.

    Attributes
    ----------
    output : str
        The finished folder.
    inputs : list of dict
        `model` and `digest` of the base and every expert, as in the manifest.
    tensors : dict
        Results by tensor name, in output order.
    seconds : float
        Wall time, in seconds.
    stage_seconds : dict
        Busy time of `read`, `compute`, `write` and `finish`, over all their threads.
    timeline : dict
        When each thread was busy: start, stop, start, stop ... in seconds, pauses bridged past
        2,000 intervals.
    read_bytes, written_bytes : int
        Moved by this run; a resumed run moves only what was unfinished.
    kept_shards : int
        Shards taken over from an interrupted run.
    peak_memory, predicted_memory : int
        Most resident bytes that are not mapped files, above the level before the merge, and the
        plan's prediction.
    peak_device_memory : dict
        Most bytes of tensors on each device, measured.
    predicted_device_memory : int
        The plan's prediction for each of them.
    drawn : bool
        Whether the HTML report was written beside it.
    part : dict or None
        `only`, `tensors` and `of` as in `Part`, where the output is a part of a merge.
    cluster : dict or None
        Where a cluster merged: `workers`, each with its `name`, the number of `shards` that it
        finished and whether it was `lost`; `cpus` and `gpus` of each. Stage seconds then are sums
        over workers, and memory that of the worker that took most.
    """

    output: str
    plan_id: str
    method: str
    recipe: dict[str, Any]
    device: str
    workers: int
    threads: int
    versions: dict[str, str]
    left_out: dict[str, str]
    tensors: dict[str, TensorResult] = field(default_factory=dict)
    seconds: float = 0.0
    stage_seconds: dict[str, float] = field(default_factory=dict)
    timeline: dict[str, list[float]] = field(default_factory=dict)
    read_bytes: int = 0
    written_bytes: int = 0
    kept_shards: int = 0
    peak_memory: int = 0
    predicted_memory: int = 0
    peak_device_memory: dict[str, int] = field(default_factory=dict)
    predicted_device_memory: int = 0
    inputs: list[dict[str, str]] = field(default_factory=list)
    drawn: bool = False
    part: dict[str, Any] | None = None
    cluster: dict[str, Any] | None = None

    @property
    def notes(self) -> dict[str, tuple[str, ...]]:
        """Clamps, fallbacks and warnings by tensor, the same in every run of one plan."""
        return {name: result.notes for name, result in self.tensors.items() if result.notes}

    @property
    def all_notes(self) -> dict[str, tuple[str, ...]]:
        """The same, and where a device ran out of memory."""
        found = {name: (*r.notes, *r.memory_notes) for name, r in self.tensors.items()}
        return {name: notes for name, notes in found.items() if notes}

    @property
    def rules(self) -> dict[str, int]:
        """How many tensors each rule has."""
        return dict(Counter(result.rule for result in self.tensors.values()))

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return {**asdict(self), "rules": self.rules}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> MergeReport:
        """Read what `to_dict` and a round through JSON made of a report."""
        values = {k: v for k, v in content.items() if k != "rules"}
        try:
            tensors = {k: TensorResult.from_dict(v) for k, v in values.pop("tensors").items()}
            return cls(**values, tensors=tensors)
        except (AttributeError, KeyError, TypeError) as error:
            raise VerificationError(f"not the report of a merge: {error!r}") from error
