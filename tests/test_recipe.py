"""The recipe dialect: parsing, resolution per tensor, and mistakes reported together."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from resm_kernels.errors import RecipeError, ResmError
from resm_kernels.recipe import (
    Recipe,
    build_recipe,
    build_recipes,
    layer_positions,
    parse_yaml,
    read_recipe,
    sweep_outputs,
)
from tests.hostile.mutate import mutations, odd


def parse_recipe(text: str | bytes, source: str = "recipe") -> Recipe:
    return build_recipe(parse_yaml(text, source), source)


GOOD = """
merge_method: resm
base_model: org/base@v1
models:
  - model: experts/a
    parameters: {weight: 0.5}
  - model: experts/b
parameters:
  sigma: 2.5
  outlier_power:
    - {filter: self_attn, value: [0, 1]}
    - value: 0.5
lambda: 0.8
out_dtype: bfloat16
"""


def test_a_full_recipe_resolves_per_tensor() -> None:
    recipe = parse_recipe(GOOD)
    assert recipe.method == "resm"
    assert recipe.base.repo == ("org/base", "v1")
    assert recipe.weights("x", 0.0) == (0.5, 1.0)
    options = recipe.options("model.layers.1.self_attn.q_proj.weight", 0.75)
    assert (options.lambda_, options.sigma, options.outlier_power) == (0.8, 2.5, 0.75)
    assert recipe.options("model.layers.1.mlp.up_proj.weight", 0.75).outlier_power == 0.5


def test_a_recipe_survives_its_own_dictionary() -> None:
    recipe = parse_recipe(GOOD)
    again = build_recipe(recipe.to_dict(), "again")
    assert again == recipe


def test_layer_positions_follow_the_first_number_of_each_stack() -> None:
    names = [
        "embed.weight",
        "model.layers.0.a",
        "model.layers.1.experts.7.a",
        "model.layers.2.a",
        "encoder.0.a",
        "lm_head.weight",
    ]
    assert layer_positions(names) == {
        "embed.weight": 0.0,
        "model.layers.0.a": 0.0,
        "model.layers.1.experts.7.a": 0.5,
        "model.layers.2.a": 1.0,
        "encoder.0.a": 1.0,
        "lm_head.weight": 0.0,
    }


def test_the_base_among_the_models_is_not_an_expert_of_itself() -> None:
    text = "merge_method: tsvm\nbase_model: b\nmodels: [{model: b}, {model: e}]"
    assert [str(e.model) for e in parse_recipe(text).experts] == ["e"]
    linear = text.replace("tsvm", "linear")
    assert [str(e.model) for e in parse_recipe(linear).experts] == ["b", "e"]
    without = "merge_method: linear\nmodels: [{model: a}, {model: e}]"
    assert str(parse_recipe(without).base) == "a"


RESM = "merge_method: resm\nbase_model: b\nmodels: [{model: a}]\n"
LINEAR = "merge_method: linear\nmodels: [{model: a}]\n"
MISTAKES = {
    "merge_metod: resm": "merge_metod: unknown key; .*did you mean 'merge_method'",
    "merge_method: tvsm": "expected one of .*did you mean 'tsvm'",
    "merge_method: resm\nmodels: [{model: a}]": "base_model: missing",
    "merge_method: linear\nmodels: []": "models: expected a list",
    "merge_method: linear\nmodels: [a]": r"models\[0\]: got 'a'",
    "merge_method: linear\nmodels: [{model: 3}]": r"models\[0\].model: got 3",
    "merge_method: linear\nmodels: [{model: a, weight: 1}]": r"models\[0\].weight: unknown key",
    "merge_method: linear\nmodels: [{model: a, parameters: {weight: x}}]": "got 'x', expected a ",
    LINEAR + "parameters: {normalize: 2}": "expected true or f",
    LINEAR + "outputs: [{name: a}]": "outputs: several outputs",
    LINEAR + "overrides: [{filter: x, merge_method: tsvm}]": "base_model: missing; tsvm merges",
    RESM + "overrides: [{merge_method: tsvm}]": r"overrides\[0\].filter: got None",
    RESM + "overrides: [{filter: a, merge_method: tvsm}]": r"\.merge_method: .*mean 'tsvm'",
    RESM + "overrides: [{filter: a, parameters: {sgma: 1}}]": "mean 'sigma'",
    RESM + "overrides: {}": "overrides: expected a list",
    RESM.replace("{model: a}", "{model: a}, {model: b}")
    + "overrides: [{filter: norm, merge_method: linear}]": "the base is listed",
    LINEAR + "dtype: bf16": "dtype: got 'bf16'",
    LINEAR + "slices: []": "slices: layer slicing is not supp",
    LINEAR + "tokenizer_source: 3": "expected base, union or a model",
    RESM + "parameters: {sigma: -1}": ">= 0",
    RESM + "parameters: {sigma: .nan}": "number",
    RESM + "parameters: {sgma: 1}": "mean 'sigma'",
    RESM + "parameters: {rank: big}": "one of ene",
    RESM + "parameters: {sigma: []}": "empty list",
    "merge_method: resm\nbase_model: b\nmodels: [{model: b}]": "no model besides the base",
    RESM + "lambda: 1\nparameters: {lambda: 1}": ("lambda: stands at the top and under parameters"),
    "merge_method: linear\nbase_model: b\nmodels: [{model: a}]\nparameters: {weight: 1}": (
        "list the base under models"
    ),
    "a: 1\na: 2": "'a' stands twice",
    "a: &x [1]\nb: *x": "aliases are not allowed",
    "a: !!python/object/apply:os.system [true]": "could not determine a constructor",
    "[1, 2]": "expected a mapping",
    "a: {<<: {b: 1}}": "merge keys",
    "a: [": "not valid YAML",
    "[" * 3000: "not valid YAML|nested too deeply",
    "": "expected a mapping",
}


@pytest.mark.parametrize("text", MISTAKES, ids=lambda text: text[:40].replace("\n", ";"))
def test_mistakes_say_what_is_wrong(text: str) -> None:
    with pytest.raises(RecipeError, match=MISTAKES[text]):
        parse_recipe(text)


def test_all_mistakes_are_reported_together() -> None:
    text = "merge_method: resm\nmodels: [{modl: a}]\nparameters: {sigma: x}\ndtype: int8"
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "r.yml")
    assert len(caught.value.mistakes) == 5
    assert str(caught.value).startswith("r.yml: 5 mistakes")


def test_a_long_file_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "r.yml"
    path.write_bytes(b"# " + b"x" * (2 << 20))
    with pytest.raises(RecipeError, match="longer than"):
        build_recipe(read_recipe(path), str(path))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)
KEYS = st.sampled_from(
    ["merge_method", "base_model", "models", "parameters", "lambda", "dtype", "out_dtype", "x"]
)
MODELS = st.lists(
    st.fixed_dictionaries({"model": st.text(max_size=4)}, optional={"parameters": JSON}), max_size=3
)


@given(
    st.dictionaries(KEYS, JSON),
    st.sampled_from(["resm", "linear", "iso_c"]) | JSON,
    MODELS | JSON,
)
def test_any_data_give_a_recipe_or_a_clear_error(
    content: dict[str, object], method: object, models: object
) -> None:
    try:
        recipe = build_recipe({**content, "merge_method": method, "models": models}, "fuzz")
    except ResmError:
        return
    recipe.options("model.layers.0.w", 0.5)
    recipe.weights("model.layers.0.w", 0.5)
    assert build_recipe(recipe.to_dict(), "again") == recipe


ODD = odd("nan", "resm", "linear", "org/name@main", [1, "a"], {"filter": "x"}, float("nan"), 1e308)


@settings(max_examples=300)
@given(st.data(), st.integers(1, 4))
def test_a_mutated_recipe_is_refused_or_means_the_same_from_yaml(
    data: st.DataObject, changes: int
) -> None:
    """Two or three wrong values in a full recipe: one list of mistakes, or a usable recipe."""
    content = yaml.safe_load(GOOD)
    for _ in range(changes):
        data.draw(mutations(content, ODD, ("lambda", "weight", "value", "models", "x")))
    try:
        recipe = build_recipe(content, "fuzz")
    except ResmError as error:
        told = str(error)
        with pytest.raises(RecipeError) as caught:
            parse_recipe(yaml.safe_dump(content, sort_keys=False), "fuzz")
        assert str(caught.value) == told
        return
    assert parse_recipe(yaml.safe_dump(content, sort_keys=False), "fuzz") == recipe
    assert build_recipe(recipe.to_dict(), "again") == recipe
    recipe.options("model.layers.0.self_attn.w", 0.5)


@given(st.data(), st.integers(0, len(GOOD)), st.integers(0, 12))
def test_a_recipe_cut_and_mended_anywhere_gives_our_errors_only(
    data: st.DataObject, start: int, length: int
) -> None:
    piece = data.draw(st.text(alphabet="{}[]:,-&*!|>'\"#%@`? \n\t0ae", max_size=6))
    with contextlib.suppress(ResmError):
        parse_recipe(GOOD[:start] + piece + GOOD[start + length :])


@given(st.binary(max_size=200) | st.text(max_size=200))
def test_any_text_gives_a_recipe_or_a_clear_error(text: bytes | str) -> None:
    with contextlib.suppress(ResmError):
        parse_recipe(text)


def test_parameters_of_other_methods_are_ignored_by_name() -> None:
    """So that a recipe stays valid when one word, its method, changes."""
    recipe = parse_recipe(LINEAR + "lambda: 1\nparameters: {sigma: 2, normalize: false}")
    assert recipe.ignored == (
        "parameters.sigma: linear has no such parameter",
        "lambda: linear has no such parameter",
    )
    assert set(recipe.parameters) == {"normalize"}
    assert recipe == parse_recipe(LINEAR + "parameters: {normalize: false}")


def test_overrides_choose_method_and_parameters_by_tensor() -> None:
    recipe = parse_recipe(
        """
merge_method: resm
base_model: b
models:
  - {model: a, parameters: {weight: 2}}
  - {model: c}
parameters: {sigma: 5, lambda: 0.5}
overrides:
  - {filter: mlp, merge_method: tsvm, parameters: {weight: 3, lambda: [0, 1]}}
  - {filter: up_proj, merge_method: linear}
  - {filter: attn, parameters: {sigma: 7}}
"""
    )
    assert recipe.method_for("mlp.up_proj").name == "tsvm"
    assert recipe.method_for("x.up_proj").name == "linear"
    assert recipe.method_for("norm").name == "resm"
    assert recipe.weights("mlp.up_proj", 0.0) == (3.0, 3.0)
    assert recipe.weights("norm", 0.0) == (2.0, 1.0)
    assert recipe.options("mlp.up_proj", 1.0).lambda_ == 1.0
    assert recipe.options("attn", 0.0).sigma == 7.0
    assert recipe.options("norm", 0.0).sigma == 5.0
    assert recipe == build_recipe(recipe.to_dict(), "again")


OUTPUTS = RESM + "parameters: {lambda: 2, sigma: 4}\n"


def test_outputs_say_what_differs() -> None:
    text = (
        OUTPUTS
        + """
outputs:
  - {name: mild, lambda: 0.5}
  - {name: other, parameters: {lambda: 1, outlier_power: 0}}
  - {name: plain, merge_method: task_arithmetic}
"""
    )
    recipes = build_recipes(parse_yaml(text, "r"), "r")
    assert list(recipes) == ["mild", "other", "plain"]
    assert recipes["mild"].parameters == {"lambda": 0.5, "sigma": 4.0}
    assert recipes["other"].parameters == {"lambda": 1.0, "sigma": 4.0, "outlier_power": 0.0}
    assert recipes["plain"].method == "task_arithmetic"
    assert recipes["plain"].parameters == {"lambda": 2.0}
    assert list(build_recipes(parse_yaml(OUTPUTS, "r"), "r")) == [""]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ("{}", "outputs: expected a list"),
        ("[]", "outputs: expected a list"),
        ("[a]", r"outputs\[0\]: got 'a'"),
        ("[{lambda: 1}]", r"outputs\[0\].name: got None"),
        ("[{name: ../up}]", "expected a folder's name"),
        ("[{name: a}, {name: A}]", "'A' stands twice"),
        ("[{name: a, lamda: 1}]", "mean 'lambda'"),
        ("[{name: a, merge_method: tvsm}]", r"outputs\[0\]: merge_method: .*tsvm"),
        ("[{name: a, parameters: 3}]", r"outputs\[0\]: parameters: got 3"),
        ("[{name: a, models: []}]", r"outputs\[0\].models: unknown key"),
    ],
)
def test_mistakes_in_outputs(entries: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build_recipes(parse_yaml(f"{OUTPUTS}outputs: {entries}", "r"), "r")


def test_a_sweep_names_its_outputs() -> None:
    content = parse_yaml(RESM, "r")
    assert [o["name"] for o in sweep_outputs(content, [], [0.5, 1])["outputs"]] == [
        "lambda-0.5",
        "lambda-1",
    ]
    made = build_recipes(sweep_outputs(content, ["tsvm", "linear"], [0.5, 1]), "r")
    assert {name: recipe.method for name, recipe in made.items()} == {
        "tsvm-lambda-0.5": "tsvm",
        "tsvm-lambda-1": "tsvm",
        "linear": "linear",
    }


def test_switches_as_mergekit_saves_them() -> None:
    text = "{merge_method: ties, base_model: a, models: [{model: b}], parameters: {normalize: 0.0}}"
    assert parse_recipe(text).options("x", 0.0).normalize is False


def test_slices_are_one_mistake() -> None:
    text = "{merge_method: passthrough, slices: [{sources: [{model: a, layer_range: [0, 2]}]}]}"
    with pytest.raises(RecipeError) as found:
        parse_recipe(text)
    assert [mistake.partition(":")[0] for mistake in found.value.mistakes] == ["slices"]
