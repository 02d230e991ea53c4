"""What is compared: every method of ours, and RESM with its parts on, off and varied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from resm_kernels.methods import find_method

DENSITIES = (0.2, 0.6)
OFF: dict[str, Any] = {
    "outlier_power": 0.0, "outlier_score": "share", "sigma": 3.0, "noise_floor": 0.1,
    "mask_noise": False, "rank": "sparsity", "rank_sparsity": 0.0, "rank_energy": 0.95,
    "rank_fraction": 1.0,
}  # fmt: skip
UNVARIED = {"lambda", "exclude", "split", "solver"}


@dataclass(frozen=True)
class Candidate:
    """A method with the parameters that are not chosen on validation prompts.

    Attributes
    ----------
    label : str
        Its name in tables; candidates of one label compete on validation prompts.
    group : {"method", "ablation"}
    method : str
    parameters : dict
    scaled : bool
        Whether its lambda is chosen on validation prompts; it has none otherwise.
    """

    label: str
    group: str
    method: str
    parameters: dict[str, Any] = field(default_factory=dict)
    scaled: bool = True

    @property
    def settings(self) -> str:
        """All its parameters, defaults included, but those that no candidate varies."""
        values = self._defaults | self.parameters
        return _told({name: value for name, value in values.items() if name not in UNVARIED})

    @property
    def changed(self) -> str:
        """Its parameters that are not at their defaults."""
        defaults = self._defaults
        return _told({n: value for n, value in self.parameters.items() if value != defaults[n]})

    @property
    def _defaults(self) -> dict[str, Any]:
        return {name: option.default for name, option in find_method(self.method).specs.items()}


def _told(values: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={values[name]}" for name in sorted(values))


def methods(count: int) -> list[Candidate]:
    """Every merge method for `count` experts; `passthrough` copies one model and is none."""
    plain = [Candidate(m, "method", m, scaled=False) for m in ("linear", "model_stock")]
    if count == 2:
        plain += [
            Candidate("slerp", "method", "slerp", {"t": t}, scaled=False) for t in (0.3, 0.5, 0.7)
        ]
    spectral = ("task_arithmetic", "tsvm", "iso_c", "iso_cts", "resm")
    dense = [Candidate(m, "method", m) for m in spectral]
    sparse = [
        Candidate(m, "method", m, {"density": density})
        for m in (
            "ties", "dare_linear", "dare_ties", "della_linear", "della", "breadcrumbs",
            "breadcrumbs_ties",
        )
        for density in DENSITIES
    ]  # fmt: skip
    return plain + dense + sparse


def ablations() -> list[Candidate]:
    """RESM by its parts. All off is TSV-M."""
    varied: list[tuple[str, dict[str, Any]]] = [("all off (TSV-M)", {})]
    for power in (-1.0, 0.5, 1.0, 2.0):
        varied.append((f"weights: power {power:g}", {"outlier_power": power}))
    for power in (0.5, 1.0):
        for score in ("mass", "count"):
            varied.append(
                (
                    f"weights: power {power:g}, {score}",
                    {"outlier_power": power, "outlier_score": score},
                )
            )
        for sigma in (2.0, 4.0):
            varied.append(
                (
                    f"weights: power {power:g}, sigma {sigma:g}",
                    {"outlier_power": power, "sigma": sigma},
                )
            )
    for gamma, floor in ((0.5, 0.1), (1.0, 0.1), (1.0, 0.03), (1.0, 0.3), (1.0, 1.0)):
        varied.append(
            (
                f"rank: gamma {gamma:g}, floor {floor:g}",
                {"rank_sparsity": gamma, "noise_floor": floor},
            )
        )
    varied.append(("rank: half of p/T", {"rank": "fixed", "rank_fraction": 0.5}))
    for energy in (0.8, 0.9, 0.95):
        kept = {"rank": "energy", "rank_energy": energy}
        varied.append((f"rank: {energy:.0%} of energy", kept))
    for floor in (0.1, 0.3, 1.0):
        varied.append((f"mask: floor {floor:g}", {"mask_noise": True, "noise_floor": floor}))
    for power in (-1.0, 0.5, 1.0):
        on = {"outlier_power": power, "rank_sparsity": 1.0, "mask_noise": True}
        varied.append((f"all: power {power:g}, gamma 1, mask", on))
    for power in (0.5, 1.0):
        on = {"outlier_power": power, "rank": "energy", "rank_energy": 0.9}
        varied.append((f"both: power {power:g}, 90% of energy", on))
    return [Candidate(label, "ablation", "resm", {**OFF, **changed}) for label, changed in varied]
