"""What the mergekit backend does without mergekit; the rest is `make integration`."""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any

import pytest

from resm_backends import mergekit as backend
from resm_kernels.errors import MissingDependencyError, UsageError
from resm_kernels.methods import METHODS


def give_version(monkeypatch: pytest.MonkeyPatch, version: str, module: object) -> None:
    real = importlib.import_module
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    monkeypatch.setattr(
        importlib,
        "import_module",
        lambda name: module if name == "mergekit.merge_methods" else real(name),
    )


def test_absent_mergekit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert backend.main(["recipe.yml", "out"]) == 1
    said = capsys.readouterr().err
    assert "mergekit cannot be imported" in said
    assert "pip install 'mergekit>=0.1.4'" in said


@pytest.mark.parametrize("version", ["0.0.6", "0.1.3", "0.2.0"])
def test_unknown_mergekit(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too old, or neither of the interfaces that we know."""
    give_version(monkeypatch, version, object())
    with pytest.raises(MissingDependencyError, match="no method interface that we know") as found:
        backend.register()
    assert (found.value.got, found.value.expected) == (version, "0.1.4 or 0.1.5")


@pytest.mark.parametrize("method", backend.METHOD_NAMES)
def test_defaults_mean_our_defaults(method: str) -> None:
    """A number is handed over, a choice and the patterns are left to the method."""
    values = {s.name: s.check(s.default) for s in backend.settings(method)}
    assert backend.parameters_of(method, values) == {
        name: option.default
        for name, option in METHODS[method].specs.items()
        if option.kind not in (str, tuple) and name != "split"
    }


@pytest.mark.parametrize(
    ("name", "value", "meant"),
    [
        ("sigma", "1e-1", {"sigma": 0.1}),
        ("mask_noise", 1.0, {"mask_noise": True}),
        ("mask_noise", False, {"mask_noise": False}),
        ("exclude", 0.0, {"exclude": []}),
        ("exclude", True, {"exclude": ["*"]}),
        ("rank", "energy", {"rank": "energy"}),
        ("rank.fixed", True, {"rank": "fixed"}),
        ("rank.fixed", 0.0, {}),
    ],
)
def test_values_as_mergekit_carries_them(name: str, value: Any, meant: dict[str, Any]) -> None:
    settings = {s.name: s for s in backend.settings("resm")}
    defaults = {s.name: s.default for s in settings.values()}
    options = backend.parameters_of("resm", {**defaults, name: settings[name].check(value)})
    standing = backend.parameters_of("resm", defaults)
    assert options == {**standing, **meant}


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("sigma", True, "got True, expected a number"),
        ("sigma", -1, "got -1, expected a number >= 0"),
        ("mask_noise", 0.5, "got 0.5, expected true or false"),
        ("mask_noise", "yes", "got 'yes', expected true or false"),
        ("mask_noise", None, "got None, expected true or false"),
        ("exclude", "*mlp*", r"got '\*mlp\*', expected true or false"),
        ("rank", "enrgy", "got 'enrgy', expected one of energy, sparsity, fixed"),
        ("rank.fixed", 2, "got 2, expected true or false"),
    ],
)
def test_wrong_values_name_the_parameter(name: str, value: object, said: str) -> None:
    settings = {s.name: s for s in backend.settings("resm")}
    with pytest.raises(UsageError, match=f"parameter {name} of resm: {said}"):
        settings[name].check(value)


def test_a_choice_and_another_switch_are_refused() -> None:
    values = {s.name: s.default for s in backend.settings("resm")}
    with pytest.raises(UsageError, match="parameter rank of resm: energy and fixed at once"):
        backend.parameters_of("resm", {**values, "rank": "energy", "rank.fixed": True})
    same = backend.parameters_of("resm", {**values, "rank": "energy", "rank.energy": True})
    assert same["rank"] == "energy"


def test_parameters_are_found_wherever_mergekit_reads_them() -> None:
    model = {"model": "a", "parameters": {"weight": 1}}
    slices = [{"sources": [model], "parameters": {"lambda": 2}}]
    content = {
        "models": [model],
        "slices": slices,
        "modules": {"text": {"slices": slices, "parameters": {"sigma": 3}}},
        "parameters": {"lambda": 4},
    }
    assert [(where, per_model) for where, _, per_model in backend.scopes(content)] == [
        ("parameters", False),
        ("modules.text.parameters", False),
        ("modules.text.slices[0].parameters", False),
        ("modules.text.slices[0].sources[0].parameters", True),
        ("models[0].parameters", True),
        ("slices[0].parameters", False),
        ("slices[0].sources[0].parameters", True),
    ]


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (0.5, [0.5]),
        ([1, 2], [1, 2]),
        ({"filter": "mlp", "value": [1, 2]}, [1, 2]),
        ([{"filter": "mlp", "value": True}, {"value": [0, 1]}], [True, 0, 1]),
        ([], []),
        (None, []),
    ],
)
def test_every_scalar_of_a_setting_is_found(setting: Any, expected: list[Any]) -> None:
    assert list(backend.scalars(setting)) == expected
