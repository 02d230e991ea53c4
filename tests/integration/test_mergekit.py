"""Our methods inside the real mergekit: `make integration` runs this for 0.1.4 and for 0.1.5.

`RESM_MERGEKIT` says which version must be there; without it, and without mergekit, all is skipped.
"""
# ruff: noqa: E402 -- mergekit is imported where it is installed.

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import resm_kernels
from resm_backends import mergekit as backend
from resm_kernels.errors import NonFiniteError, UsageError
from resm_kernels.methods import METHODS
from tests.checkpoints import fine_tuned, make_state, save
from tests.mergekit.inputs import CONFIG

ASKED = os.environ.get("RESM_MERGEKIT")
if ASKED is None:
    pytest.importorskip("mergekit")

from mergekit import merge_methods
from mergekit.architecture import WeightInfo, get_architecture_info
from mergekit.common import ImmutableMap, ModelReference
from mergekit.config import MergeConfiguration
from mergekit.graph import Executor, Task
from mergekit.io.tasks import GatherTensors, SaveTensor
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner

VERSION = importlib.metadata.version("mergekit")
GROUPS = hasattr(merge_methods, "GroupMergeMethod")
"""Whether this is 0.1.5's interface."""
NAMES = backend.METHOD_NAMES
HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY = 48, 80, 3, 56
LLAMA = {
    **CONFIG,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "vocab_size": VOCABULARY,
}
EXPERTS = ("a", "b", "c")
ROUNDED_ONCE = {"dtype": "float32", "out_dtype": "bfloat16"}


@pytest.fixture(scope="module", autouse=True)
def registered() -> dict[str, str]:
    return backend.register()


def llama_shapes(*, tied: bool = False) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"{prefix}.self_attn.{name}.weight"] = (HIDDEN, HIDDEN)
        for name in ("gate_proj", "up_proj"):
            shapes[f"{prefix}.mlp.{name}.weight"] = (INTERMEDIATE, HIDDEN)
        shapes[f"{prefix}.mlp.down_proj.weight"] = (HIDDEN, INTERMEDIATE)
        shapes[f"{prefix}.input_layernorm.weight"] = (HIDDEN,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (HIDDEN,)
    shapes["model.norm.weight"] = (HIDDEN,)
    if not tied:
        shapes["lm_head.weight"] = (VOCABULARY, HIDDEN)
    return shapes


def save_llamas(
    folder: Path, *, tied: bool = False, dtypes: Mapping[str, torch.dtype] | None = None
) -> Path:
    """A tiny Llama and three experts, in one file and in shards."""
    base = make_state(3, torch.float32, llama_shapes(tied=tied))
    config = {**LLAMA, "tie_word_embeddings": tied}
    for i, model in enumerate(("base", *EXPERTS)):
        state = fine_tuned(base, i) if i else base
        dtype = (dtypes or {}).get(model, torch.bfloat16)
        shards = 1 + (i + tied) % 3
        save(folder / model, {n: t.to(dtype) for n, t in state.items()}, shards, config)
    return folder


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llamas(tmp_path_factory.mktemp("llamas"))


def recipe_for(
    llamas: Path,
    method: str,
    parameters: Mapping[str, Any] | None = None,
    weights: Mapping[str, Any] | None = None,
    **keys: Any,
) -> dict[str, Any]:
    models = [
        {"model": str(llamas / m), "parameters": {"weight": (weights or {}).get(m, 1.0)}}
        for m in EXPERTS
    ]
    return {
        "merge_method": method,
        "base_model": str(llamas / "base"),
        "models": models,
        "parameters": dict(parameters or {}),
        **keys,
    }


def write(path: Path, recipe: Mapping[str, Any]) -> str:
    path.write_text(json.dumps(recipe))  # is YAML, and has no aliases
    return str(path)


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found.update(load_file(file))
    return found


def differing(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Tensors that differ in a name, a dtype or a bit."""
    names = one.keys() ^ other.keys()
    odd: dict[str, Any] = dict.fromkeys(names, "in one only")
    for name in one.keys() - names:
        x, y = one[name].contiguous(), other[name].contiguous()
        if x.dtype != y.dtype or x.shape != y.shape:
            odd[name] = (x.dtype, y.dtype, x.shape, y.shape)
        elif not torch.equal(x.view(torch.uint8), y.view(torch.uint8)):
            odd[name] = int((x != y).sum())
    return odd


def both_ways(
    work: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any] | None = None, *options: str
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The tensors of mergekit's command and of our engine."""
    words = [write(work / "theirs.yml", theirs), str(work / "theirs")]
    assert backend.main([*words, "--quiet", "--no-copy-tokenizer", *options]) == 0
    write(work / "ours.yml", ours or theirs)
    resm_kernels.merge(recipe=work / "ours.yml", output=work / "ours")
    return tensors_in(work / "theirs"), tensors_in(work / "ours")


def test_this_is_the_version_that_was_asked_for() -> None:
    assert ASKED in (None, VERSION)
    assert (VERSION != "0.1.4") == GROUPS


GRADIENT = [0.4, 1.0]
FILTERS = [
    {"filter": "self_attn", "value": [0.2, 0.9, 1.0]},
    {"filter": "down_proj", "value": 0.25},
    {"value": 0.75},
]
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gradient": {"parameters": {"lambda": GRADIENT}, "weights": {"b": [1.0, 0.3]}},
    "filters": {"parameters": {"lambda": FILTERS, "weight": 0.5}, "weights": {"c": FILTERS}},
    "rounded once": {"parameters": {"lambda": GRADIENT}, **ROUNDED_ONCE},
    "written wider": {"dtype": "float32"},
}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("method", NAMES)
def test_same_bits_as_the_engine(method: str, settings: str, llamas: Path, tmp_path: Path) -> None:
    """Sharded and not; gradients and filters through mergekit's own parameter machinery."""
    theirs, ours = both_ways(tmp_path, recipe_for(llamas, method, **SETTINGS[settings]))
    assert theirs.keys() == llama_shapes().keys()
    assert not differing(theirs, ours)
    expected = torch.float32 if settings == "written wider" else torch.bfloat16
    assert {tensor.dtype for tensor in theirs.values()} == {expected}
    assert differing(theirs, tensors_in(llamas / "base")).keys() == theirs.keys()


OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "numbers": ({"sigma": 2, "outlier_power": [-1.0, 0.5], "noise_floor": 0.3},) * 2,
    "switch": (
        {"mask_noise": [{"filter": "mlp", "value": True}, {"value": False}], "noise_floor": 0.5},
    )
    * 2,
    "nothing excluded": ({"exclude": False}, {"exclude": []}),
    "all excluded": ({"exclude": True}, {"exclude": ["*"]}),
    "some excluded": (
        {"exclude": [{"filter": "mlp", "value": True}, {"value": False}]},
        {"exclude": ["*mlp*"]},
    ),
    "choice as switch": (
        {"rank.energy": True, "rank_energy": 0.7, "solver.textbook": 1},
        {"rank": "energy", "rank_energy": 0.7, "solver": "textbook"},
    ),
    "filtered choice": (
        {"rank.fixed": [{"filter": "mlp", "value": True}], "rank_fraction": 0.5},
        {
            "rank": [{"filter": "mlp", "value": "fixed"}, {"value": "sparsity"}],
            "rank_fraction": 0.5,
        },
    ),
}


@pytest.mark.parametrize("options", OPTIONS)
def test_every_kind_of_option_arrives(options: str, llamas: Path, tmp_path: Path) -> None:
    written, meant = OPTIONS[options]
    theirs, ours = both_ways(
        tmp_path, recipe_for(llamas, "resm", written), recipe_for(llamas, "resm", meant)
    )
    assert not differing(theirs, ours)
    write(tmp_path / "plain.yml", recipe_for(llamas, "resm"))
    resm_kernels.merge(recipe=tmp_path / "plain.yml", output=tmp_path / "plain")
    assert differing(theirs, tensors_in(tmp_path / "plain")), "the option changes nothing"


@pytest.mark.skipif(not GROUPS, reason="0.1.4's recipes carry numbers only")
def test_choices_by_name(llamas: Path, tmp_path: Path) -> None:
    recipe = recipe_for(llamas, "resm", {"rank": ["energy", "fixed"], "outlier_score": "count"})
    theirs, ours = both_ways(tmp_path, recipe)
    assert not differing(theirs, ours)


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    llamas = save_llamas(tmp_path / "tied", tied=True)
    theirs, ours = both_ways(tmp_path, recipe_for(llamas, "tsvm"))
    assert "lm_head.weight" not in theirs
    assert not differing(theirs, ours)


def test_experts_of_another_dtype(tmp_path: Path) -> None:
    """0.1.5 promotes a tensor's inputs by itself; with `dtype` both give the engine's bits."""
    wide = {"b": torch.float32, "c": torch.float16}
    llamas = save_llamas(tmp_path / "mixed", dtypes=wide)
    recipe = recipe_for(llamas, "resm")
    for folder in ("stored", "rounded"):
        (tmp_path / folder).mkdir()
    engine = {**recipe, "out_dtype": "float32"} if GROUPS else recipe
    assert not differing(*both_ways(tmp_path / "stored", recipe, engine))
    recipe = recipe_for(llamas, "resm", **ROUNDED_ONCE)
    assert not differing(*both_ways(tmp_path / "rounded", recipe))


def test_weights_follow_their_models(llamas: Path, tmp_path: Path) -> None:
    """In any order, and with the base listed among them, whose weight does not count."""
    recipe = recipe_for(llamas, "resm", weights={"a": 0.2, "b": 1.3}, dtype="float32")
    a, b, c = recipe["models"]
    base = {"model": recipe["base_model"], "parameters": {"weight": 5.0}}
    theirs, ours = both_ways(tmp_path, {**recipe, "models": [c, base, b, a]})
    assert not differing(theirs, ours)
    recipe = recipe_for(llamas, "resm", weights={"a": 1.3, "b": 0.2}, dtype="float32")
    resm_kernels.merge(recipe=write(tmp_path / "other.yml", recipe), output=tmp_path / "other")
    assert differing(ours, tensors_in(tmp_path / "other")).keys() == ours.keys()


def test_the_command_as_a_user_types_it(llamas: Path, tmp_path: Path) -> None:
    """Console script and module; mergekit's options pass through."""
    recipe = recipe_for(llamas, "resm", {"lambda": GRADIENT})
    path = write(tmp_path / "recipe.yml", recipe)
    script = str(Path(sys.executable).with_name(backend.COMMAND))
    words = {"script": [script], "module": [sys.executable, "-m", "resm_backends.mergekit"]}
    for name, command in words.items():
        if not Path(command[0]).exists():
            assert ASKED is None, f"{command[0]} is not installed"
            continue
        output = tmp_path / name
        options = ["--out-shard-size", "20000", "--num-threads", "1", "--no-copy-tokenizer"]
        subprocess.run([*command, path, str(output), *options], check=True, capture_output=True)
        assert len(list(output.glob("*.safetensors"))) > 1
        resm_kernels.merge(recipe=path, output=tmp_path / f"{name}-engine")
        assert not differing(tensors_in(output), tensors_in(tmp_path / f"{name}-engine"))
        card = (output / "README.md").read_text()
        assert "our reconstruction of RESM](https://arxiv.org/abs/2502.06876)" in card


def test_help_and_wrong_words(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert backend.main(["--help"]) == 0
    assert "--low-cpu-memory" in capsys.readouterr().out
    assert backend.main(["one"]) == 2
    assert "OUT_PATH" in capsys.readouterr().err
    assert backend.main([str(tmp_path / "absent.yml"), str(tmp_path / "out")]) == 2
    assert "absent.yml" in capsys.readouterr().err


def test_what_mergekit_would_pass_over_is_refused(
    llamas: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_for(
        llamas,
        "resm",
        {"sigmma": 2, "exclude": ["*mlp*"], "rank_sparsity": 7, "rank_energy": []},
        weights={"b": [1.0, "heavy"]},
        **{"lambda": 0.5, "merge_metod": "resm"},
    )
    recipe["models"][0]["parameters"]["sigma"] = 2
    path = write(tmp_path / "recipe.yml", recipe)
    assert backend.main([path, str(tmp_path / "out"), "--quiet"]) == 2
    said = capsys.readouterr().err
    for expected in (
        "8 mistakes",
        "lambda: mergekit has no such key, write it under parameters",
        "merge_metod: mergekit has no such key (did you mean 'merge_method'?)",
        "parameters.sigmma: resm has no such parameter here (did you mean 'sigma'?)",
        "parameters: parameter exclude of resm: got '*mlp*', expected true or false; exclude: [{",
        "parameters: parameter rank_sparsity of resm: got 7, expected a number >= 0 and <= 1",
        "parameters.rank_energy: no value",
        "models[1].parameters: parameter weight of resm: got 'heavy', expected a number",
        "models[0].parameters.sigma: resm has no such parameter here, write it under the global",
    ):
        assert expected in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(GROUPS, reason="0.1.5 carries text")
def test_a_choice_by_name_gets_its_switch_named(
    llamas: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "recipe.yml", recipe_for(llamas, "resm", {"rank": "energy"}))
    assert backend.main([path, str(tmp_path / "out")]) == 2
    assert "carries numbers only, write rank.energy: true" in capsys.readouterr().err


def test_other_methods_pass_through(llamas: Path, tmp_path: Path) -> None:
    """Their recipes are not looked at, and `task_arithmetic` is mergekit's."""
    recipe = recipe_for(llamas, "task_arithmetic", {"anything": 1}, **ROUNDED_ONCE)
    path = write(tmp_path / "recipe.yml", recipe)
    assert backend.main([path, str(tmp_path / "out"), "--quiet", "--no-copy-tokenizer"]) == 0
    assert tensors_in(tmp_path / "out").keys() == llama_shapes().keys()


def plan(recipe: Mapping[str, Any], output: Path) -> dict[str, Task]:
    """mergekit's own planner: a task per tensor."""
    config = MergeConfiguration.model_validate(dict(recipe))
    options = MergeOptions()
    architecture = get_architecture_info(config, options)
    planner = MergePlanner(config, architecture, options, config.base_model.config())
    tasks = planner.plan_to_disk(str(output))
    return {task.tensor_name: task.tensor_task for task in tasks if isinstance(task, SaveTensor)}


@pytest.mark.parametrize("method", NAMES)
def test_the_planner_resolves_parameters(method: str, llamas: Path, tmp_path: Path) -> None:
    recipe = recipe_for(llamas, method, {"lambda": GRADIENT}, weights={"b": FILTERS})
    tasks = plan(recipe, tmp_path)
    assert tasks.keys() == llama_shapes().keys()
    assert all(task.uses_accelerator() for task in tasks.values())
    assert all(task.group_label() for task in tasks.values())
    task = tasks["model.layers.1.self_attn.q_proj.weight"]
    b = ModelReference.model_validate(str(llamas / "b"))
    weight = task.input_parameters[b]["weight"] if GROUPS else task.weights[b]
    values = task.parameters if GROUPS else task.values
    assert weight == 0.9
    assert values["lambda"] == 0.7
    assert values["exclude"] is None


@pytest.mark.parametrize("method", NAMES)
def test_the_registry_tells_every_parameter(method: str) -> None:
    found = merge_methods.get(method)
    options = METHODS[method].specs
    switches = {f"{o.name}.{c}" for o in options.values() for c in o.choices}
    if GROUPS:
        parameters = {p.name: p for p in found.spec.shared_parameters}
        (weight,) = found.spec.input_parameters
        assert not any(p.required for p in found.spec.parameters)
        assert parameters["lambda"].validate("1e-1") == 0.1
        assert (weight.name, weight.default, weight.scope.value) == ("weight", 1.0, "non_base")
        defaults = {name: p.default for name, p in parameters.items()}
        assert found.spec.reference_url.startswith("https://arxiv.org/abs/2")
    else:
        defaults = {p.name: p.default_value for p in found.parameters()}
        assert not any(p.required for p in found.parameters())
        assert [(p.name, p.default_value) for p in found.tensor_parameters()] == [("weight", 1.0)]
        assert found.name() == method
        assert found.reference_url().startswith("https://arxiv.org/abs/2")
    assert defaults.keys() == options.keys() - {"split"} | switches
    assert defaults["lambda"] == 1.0
    assert defaults["exclude"] is None


@pytest.mark.parametrize("parameters", [{"sigma": -1}, {"exclude": 0.5}], ids=str)
def test_wrong_values_fail_while_planning(
    parameters: dict[str, Any], llamas: Path, tmp_path: Path
) -> None:
    """Also without our command's look at the recipe; the message names the parameter."""
    with pytest.raises(UsageError, match=f"parameter {next(iter(parameters))} of resm: got"):
        plan(recipe_for(llamas, "resm", parameters), tmp_path)


def test_two_choices_at_once_are_refused(llamas: Path, tmp_path: Path) -> None:
    choices = {"rank.energy": True, "rank.fixed": True}
    tasks = plan(recipe_for(llamas, "resm", choices), tmp_path)
    with pytest.raises(UsageError, match="parameter rank of resm: energy and fixed at once"):
        list(Executor([tasks["model.norm.weight"]]).run(quiet=True))


def merge_in_mergekit(
    method: str,
    base: torch.Tensor | None,
    experts: Mapping[str, torch.Tensor | None],
    *,
    optional: bool = False,
) -> torch.Tensor:
    """One tensor through the task that mergekit's graph would run; None is a missing tensor."""
    weight = WeightInfo(name="layer.weight", optional=optional)
    given = {"base": base, **experts}
    tensors = {ModelReference.model_validate(m): t for m, t in given.items() if t is not None}
    models = [ModelReference.model_validate(m) for m in given]
    gather = GatherTensors(weight_info=ImmutableMap(dict.fromkeys(models, weight)))
    found = merge_methods.get(method)
    if not GROUPS:
        task = found.make_task(
            output_weight=weight,
            tensors=gather,
            parameters=ImmutableMap({p.name: p.default_value for p in found.parameters()}),
            tensor_parameters=ImmutableMap({m: ImmutableMap({"weight": 1.0}) for m in models}),
            base_model=models[0],
        )
        return task.execute(tensors=tensors)
    from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask

    task = ExecuteMergeMethodTask(
        method_name=method,
        gather_tensors=gather,
        model_order=tuple(models),
        base_model=models[0],
        output_weight=weight,
        parameters=ImmutableMap({p.name: p.default for p in found.spec.shared_parameters}),
        input_parameters=ImmutableMap({m: ImmutableMap({"weight": 1.0}) for m in models}),
    )
    return task.execute(tensors)


def small(seed: int, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("method", NAMES)
def test_inputs_are_borrowed(method: str) -> None:
    """Strided views, as mergekit may hand them over, stay as they are; the result is new memory."""
    tensors = [small(i, 12, 20).T for i in range(4)]
    before = [t.clone() for t in tensors]
    merged = merge_in_mergekit(method, tensors[0], dict(zip(EXPERTS, tensors[1:], strict=True)))
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))
    assert merged.untyped_storage().data_ptr() not in {
        t.untyped_storage().data_ptr() for t in tensors
    }
    expected = resm_kernels.merge_tensors(before[0], before[1:], method, name="layer.weight")
    assert torch.equal(merged, expected)


@pytest.mark.parametrize("shape", [(), (5,), (0, 4), (1, 7), (3, 2, 4)], ids=str)
def test_shapes_that_are_no_matrix_get_the_mean_of_deltas(shape: tuple[int, ...]) -> None:
    base, *experts = (small(i, *shape, dtype=torch.float32) for i in range(4))
    merged = merge_in_mergekit("resm", base, dict(zip(EXPERTS, experts, strict=True)))
    mean = base + sum(expert - base for expert in experts) / 3
    torch.testing.assert_close(merged, mean)


def test_tensors_that_some_models_lack() -> None:
    base, a, c = (small(i, 12, 12) for i in range(3))
    missing: dict[str, torch.Tensor | None] = {"a": a, "b": None, "c": c}
    merged = merge_in_mergekit("resm", base, missing, optional=True)
    assert torch.equal(merged, resm_kernels.merge_tensors(base, [a, c], "resm"))
    alone = merge_in_mergekit("resm", base, dict.fromkeys(EXPERTS), optional=True)
    assert torch.equal(alone, base)
    with pytest.raises((UsageError, ValueError), match=r"layer\.weight"):
        merge_in_mergekit("resm", None, {"a": a, "c": c}, optional=True)


def test_integer_tensors_are_the_bases() -> None:
    counter = torch.tensor([7])
    merged = merge_in_mergekit("resm", counter, dict.fromkeys(EXPERTS, counter.clone()))
    assert torch.equal(merged, counter)


def test_errors_name_the_tensor_and_the_models() -> None:
    base, bad = small(0, 6, 6), small(1, 6, 6)
    bad[2, 3] = torch.nan
    with pytest.raises(NonFiniteError, match=r"'layer\.weight': expert 2 .*expert 2 is b"):
        merge_in_mergekit("resm", base, {"a": base, "b": bad})
    with pytest.raises((UsageError, ValueError), match=r"layer\.weight"):
        merge_in_mergekit("resm", base, {"a": base, "b": small(1, 6, 7)})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_tensors_stay_on_the_gpu() -> None:
    tensors = [small(i, 64, 48).cuda() for i in range(4)]
    merged = merge_in_mergekit("resm", tensors[0], dict(zip(EXPERTS, tensors[1:], strict=True)))
    assert merged.device == tensors[0].device


def test_a_method_that_a_fork_has_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Theirs:
        class spec:
            name = "resm"

    if GROUPS:
        registry = {"resm": Theirs(), "linear": merge_methods.get("linear")}
        monkeypatch.setattr(merge_methods.registry, "_METHODS", registry)
    else:
        registry = {"resm": Theirs()}
        monkeypatch.setattr(merge_methods, "REGISTERED_MERGE_METHODS", registry)
    theirs = registry["resm"]
    for _ in range(2):
        names = backend.register()
        assert names == {name: name for name in NAMES} | {"resm": "resm_kernels.resm"}
        assert merge_methods.get("resm") is theirs
        assert merge_methods.get("resm_kernels.resm").resm_kernels_method == "resm"
    assert "has a method resm of its own; ours is resm_kernels.resm" in caplog.text


@pytest.mark.skipif(ASKED is None, reason="make integration fetches mergekit's own tests")
def test_mergekits_own_tests_pass_with_ours_registered(tmp_path: Path) -> None:
    """Those of its source release that need no helper that the release leaves out.

    0.1.5 runs some of them over every registered method, so over ours.
    """
    source = Path(sys.prefix) / f"mergekit-{VERSION}" / "tests"
    files = [f for f in sorted(source.glob("test_*.py")) if "from tests" not in f.read_text()]
    assert len(files) >= 4
    (tmp_path / "plugin.py").write_text(
        "from resm_backends.mergekit import register\n\nregister()\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-p", "plugin", "-p", "no:cacheprovider",
         "--rootdir", str(source), "-c", os.devnull, *map(str, files)],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    for method in NAMES:
        assert not GROUPS or f"without_mutation[{method}] PASSED" in done.stdout


def test_the_recipes_of_the_documentation_run(llamas: Path, tmp_path: Path) -> None:
    """The YAML blocks of docs/backends.md, with our models in the place of theirs."""
    text = (Path(__file__).parents[2] / "docs" / "backends.md").read_text()
    section = text.partition("## mergekit")[2].partition("\n## ")[0]
    blocks = [part.partition("```")[0] for part in section.split("```yaml\n")[1:]]
    assert len(blocks) == 2
    for i, block in enumerate(blocks):
        recipe = yaml.safe_load(block)
        named = [recipe["base_model"], *(m["model"] for m in recipe["models"])]
        for name, here in zip(named, ("base", *EXPERTS), strict=False):
            block = block.replace(name, str(llamas / here))
        path = tmp_path / f"{i}.yml"
        path.write_text(block)
        words = [str(path), str(tmp_path / str(i)), "--quiet", "--no-copy-tokenizer"]
        assert backend.main(words) == 0
    assert json.loads((tmp_path / "0" / "config.json").read_text())["model_type"] == "llama"
