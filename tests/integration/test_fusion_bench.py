"""The FusionBench algorithm in the real fusion-bench: its command, its pools, its own TSV-M."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

pytest.importorskip("fusion_bench")

import fusion_bench
from fusion_bench.method.task_singular_vector import TaskSingularVectorMerging
from fusion_bench.modelpool import CausalLMPool, CLIPVisionModelPool
from fusion_bench.utils.hydra_utils import initialize_hydra_config
from safetensors.torch import load_file
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

import resm_kernels
from resm_backends.fusion_bench import ResmKernelsMerging
from resm_kernels.errors import UsageError
from tests import oracle
from tests.checkpoints import contents

COMMAND = Path(sys.executable).with_name("fusion_bench")
CONFIGS = sorted(
    path.stem
    for path in Path(sys.modules["resm_backends"].__path__[0]).glob("config/method/*/*.yaml")
    if path.stem != "merge"
)
EXPERTS = ("math", "code", "chat")
WEIGHTS = [1.0, 0.5, 2.0]
State = Mapping[str, Any]


def change(model: nn.Module, seed: int) -> nn.Module:
    """A copy with Gaussian changes, as if fine-tuned."""
    tuned = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in tuned.state_dict().values():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
                tensor.add_(0.05 * noise)
    return tuned


def save_models(folder: Path, base: Any) -> dict[str, str]:
    """A base and three experts on disk, by the names that a pool gives them."""
    models = {"_pretrained_": base}
    models |= {name: change(base, seed) for seed, name in enumerate(EXPERTS, start=1)}
    for name, model in models.items():
        model.save_pretrained(folder / name)
    return {name: str(folder / name) for name in models}


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    return save_models(tmp_path_factory.mktemp("llamas"), model)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=8,
        patch_size=4,
    )
    return save_models(tmp_path_factory.mktemp("clips"), CLIPVisionModel(config))


class Mixed(nn.Module):
    """What a state dict can hold: tied matrices, buffers, integers, scalars, convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.words = nn.Linear(24, 16, bias=False)
        self.body = nn.Linear(16, 24)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.decoder = nn.Linear(24, 16, bias=False)
        self.decoder.weight = self.words.weight
        self.register_buffer("positions", torch.arange(7))


@pytest.fixture
def modules() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    models: dict[str, nn.Module] = {"_pretrained_": Mixed()}
    for seed, name in enumerate(EXPERTS, start=1):
        models[name] = change(models["_pretrained_"], seed)
        models[name].norm.num_batches_tracked.fill_(seed)
    return models


def assert_same(got: State, expected: State) -> None:
    """To the last bit."""
    assert got.keys() == expected.keys()
    assert {k: v.dtype for k, v in got.items()} == {k: v.dtype for k, v in expected.items()}
    assert [k for k, v in got.items() if not torch.equal(v, expected[k])] == []


def llama_pool(models: Mapping[str, Any], **options: Any) -> CausalLMPool:
    return CausalLMPool(dict(models), tokenizer=None, **options)


def causal_lm(path: str, target: str = "transformers.AutoModelForCausalLM.from_pretrained") -> Any:
    return {"_target_": target, "pretrained_model_name_or_path": path}


def run_command(folder: Path, models: Mapping[str, str], *words: str) -> None:
    """`fusion_bench` as a user types it, with a pool config of the user's own."""
    pool = {
        "_target_": "fusion_bench.modelpool.CausalLMPool",
        "_recursive_": False,
        "enable_lazy_loading": True,
        "models": dict(models),
        "model_kwargs": {"torch_dtype": "bfloat16"},
        "tokenizer": None,
    }
    pools = folder / "configs" / "modelpool"
    pools.mkdir(parents=True)
    (pools / "llamas.yaml").write_text(yaml.safe_dump(pool, sort_keys=False))
    line = [COMMAND, "--config-dir", "configs", "modelpool=llamas", "taskpool=dummy", *words]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_command_merges_from_disk_to_disk(llamas: dict[str, str], tmp_path: Path) -> None:
    """Every file but those that say how long it took is `resm_kernels.merge`'s to the byte."""
    words = ["method=resm_kernels/resm", "method.output=merged", "method.weights=[1,0.5,2]"]
    words += ["+method.parameters.lambda=0.5", "+method.options.shard_size=20KB"]
    run_command(tmp_path, llamas, *words)
    resm_kernels.merge(
        llamas["_pretrained_"],
        [llamas[name] for name in EXPERTS],
        tmp_path / "expected",
        "resm",
        weights=WEIGHTS,
        parameters={"lambda": 0.5},
        shard_size="20KB",
    )
    merged, expected = contents(tmp_path / "merged"), contents(tmp_path / "expected")
    assert merged.keys() == expected.keys()
    differing = {n for n in expected if merged[n] != expected[n]}
    assert differing <= {"resm_report.json", "resm_report.html"}
    assert sum(name.endswith(".safetensors") for name in expected) > 1
    (report,) = tmp_path.glob("outputs/*/*/program_report.json")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "expected")
    assert json.loads(report.read_text())["model_info"]["all_params"] == sum(
        parameter.numel() for parameter in model.parameters()
    )


def test_the_command_merges_in_memory(llamas: dict[str, str], tmp_path: Path) -> None:
    """What FusionBench then saves is what the other route writes."""
    run_command(tmp_path, llamas, "method=resm_kernels/tsvm", "merged_model_save_path=saved")
    resm_kernels.merge(
        llamas["_pretrained_"], [llamas[e] for e in EXPERTS], tmp_path / "expected", "tsvm"
    )
    file = "model.safetensors"
    assert_same(load_file(tmp_path / "saved" / file), load_file(tmp_path / "expected" / file))


@pytest.mark.parametrize("name", CONFIGS)
def test_each_config_runs_its_method(name: str, llamas: dict[str, str], tmp_path: Path) -> None:
    overrides = [f"method=resm_kernels/{name}", f"method.output={tmp_path / 'merged'}"]
    config = initialize_hydra_config("fabric_model_fusion", [*overrides, "taskpool=dummy"]).method
    algorithm = fusion_bench.instantiate(config)
    model = algorithm.run(llama_pool(llamas))
    resm_kernels.merge(
        llamas["_pretrained_"], [llamas[e] for e in EXPERTS], tmp_path / "expected", name
    )
    merged = (tmp_path / "merged" / "model.safetensors").read_bytes()
    assert merged == (tmp_path / "expected" / "model.safetensors").read_bytes()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    on_disk = load_file(tmp_path / "merged" / "model.safetensors")
    assert_same({k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}, on_disk)


def test_any_method_by_name(llamas: dict[str, str]) -> None:
    overrides = ["method=resm_kernels/merge", "method.method_name=iso_c"]
    config = initialize_hydra_config("fabric_model_fusion", overrides).method
    assert fusion_bench.instantiate(config).method_name == "iso_c"


@pytest.mark.parametrize(
    ("options", "make"),
    [
        ({}, causal_lm),
        ({"enable_lazy_loading": True}, causal_lm),
        (
            {"enable_lazy_loading": True},
            lambda path: causal_lm(path, "transformers.LlamaForCausalLM"),
        ),
        ({"enable_lazy_loading": True, "model_kwargs": {"torch_dtype": "float32"}}, str),
    ],
    ids=["loader", "lazy loader", "lazy class", "lazy path"],
)
def test_pools_of_paths_on_disk_and_in_memory(
    options: dict[str, Any], make: Callable[[str], Any], llamas: dict[str, str], tmp_path: Path
) -> None:
    """One pool, both routes: the same values, loaded as the pool loads them."""
    pool = llama_pool({name: make(path) for name, path in llamas.items()}, **options)
    streamed = ResmKernelsMerging("tsvm", output=tmp_path / "merged").run(pool)
    in_memory = ResmKernelsMerging("tsvm").run(pool)
    assert isinstance(streamed, LlamaForCausalLM)
    assert isinstance(in_memory, LlamaForCausalLM)
    if "model_kwargs" in options:
        assert streamed.dtype == in_memory.dtype == torch.float32
        rounded = {k: v.to(torch.bfloat16) for k, v in in_memory.state_dict().items()}
        assert_same({k: v.to(torch.bfloat16) for k, v in streamed.state_dict().items()}, rounded)
    else:
        assert_same(streamed.state_dict(), in_memory.state_dict())
    assert list(pool.model_names) == list(EXPERTS)
    assert pool.enable_lazy_loading == options.get("enable_lazy_loading", False)


def test_fused_weights_are_split_in_memory_as_on_disk(tmp_path: Path) -> None:
    """The model's config tells which maps `qkv_proj` and `gate_up_proj` hold."""
    torch.manual_seed(0)
    config = Phi3Config(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    pool = llama_pool(save_models(tmp_path / "models", Phi3ForCausalLM(config)))
    merged = ResmKernelsMerging("tsvm", None, WEIGHTS).run(pool)
    streamed = ResmKernelsMerging("tsvm", None, WEIGHTS, output=tmp_path / "merged").run(pool)
    assert_same(merged.state_dict(), streamed.state_dict())
    whole = ResmKernelsMerging("tsvm", {"split": False}, WEIGHTS).run(pool).state_dict()
    fused = "model.layers.0.self_attn.qkv_proj.weight"
    assert not torch.equal(merged.state_dict()[fused], whole[fused])


def test_nothing_is_loaded_where_no_model_is_wanted(
    llamas: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CausalLMPool, "load_model", lambda *_: pytest.fail("loaded a model"))
    algorithm = ResmKernelsMerging(
        "linear", output=tmp_path / "m", options={"out_dtype": "float32"}, return_model=False
    )
    assert algorithm.run(llama_pool(llamas)) is None
    assert {t.dtype for t in load_file(tmp_path / "m/model.safetensors").values()} == {
        torch.float32
    }


@pytest.mark.parametrize("method", ["resm", "tsvm", "iso_c"])
def test_clip_vision_pool_in_memory(method: str, clips: dict[str, str], tmp_path: Path) -> None:
    pool = CLIPVisionModelPool(dict(clips))
    parameters = {"lambda": 0.7, "exclude": []}
    merged = ResmKernelsMerging(method, parameters, WEIGHTS).run(pool)
    base, *experts = (CLIPVisionModel.from_pretrained(path).state_dict() for path in clips.values())
    assert_same(
        merged.state_dict(),
        resm_kernels.merge_state_dicts(
            base, experts, method, weights=WEIGHTS, parameters=parameters
        ),
    )
    streamed = ResmKernelsMerging(method, parameters, WEIGHTS, output=tmp_path / "merged").run(pool)
    assert_same(streamed.state_dict(), merged.state_dict())


@pytest.mark.parametrize("as_pool", [True, False])
def test_modules_in_memory(modules: dict[str, nn.Module], as_pool: bool) -> None:
    before = {name: copy.deepcopy(module.state_dict()) for name, module in modules.items()}
    pool: Any = fusion_bench.BaseModelPool(modules) if as_pool else modules
    merged = ResmKernelsMerging("tsvm", {"lambda": 0.5}, WEIGHTS).run(pool)
    for name, module in modules.items():
        assert_same(module.state_dict(), before[name])
    assert merged.decoder.weight is merged.words.weight
    base, *experts = before.values()
    assert_same(
        merged.state_dict(),
        resm_kernels.merge_state_dicts(
            base, experts, "tsvm", weights=WEIGHTS, parameters={"lambda": 0.5}
        ),
    )
    assert merged.norm.num_batches_tracked == 0


def test_tied_weights_follow_their_first_name(modules: dict[str, nn.Module]) -> None:
    """Rules of one name only may not depend on which name is loaded last."""
    for rule in ("words*", "decoder*"):
        merged = ResmKernelsMerging("tsvm", {"exclude": [rule]}).run(modules)
        base, *experts = (m.state_dict()["words.weight"] for m in modules.values())
        expected = resm_kernels.merge_tensors(
            base, experts, "tsvm", parameters={"exclude": [rule]}, name="words.weight"
        )
        assert torch.equal(merged.decoder.weight, expected)


def test_weights_tied_in_the_base_alone_are_refused(modules: dict[str, nn.Module]) -> None:
    expert: Any = modules["code"]
    expert.decoder.weight = nn.Parameter(expert.words.weight + 1.0)
    with pytest.raises(UsageError, match=r"(?s)code: .*decoder.weight and words.weight"):
        ResmKernelsMerging("tsvm").run(modules)


def test_target_modules_alone_are_merged(modules: dict[str, Any]) -> None:
    """FusionBench's attribute for models whose heads stay as they are."""
    for module in modules.values():
        module._fusion_bench_target_modules = ["body", "norm"]
    merged: Any = ResmKernelsMerging("tsvm").run(modules)
    base = modules["_pretrained_"]
    assert torch.equal(merged.stem.weight, base.stem.weight)
    expected = resm_kernels.merge_tensors(
        base.body.weight, [modules[name].body.weight for name in EXPERTS], "tsvm"
    )
    assert torch.equal(merged.body.weight, expected)


class Linears(nn.Module):
    """Wide, tall and square matrices, a bias, and a table that is no linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(80, 48)
        self.wide = nn.Linear(96, 48)
        self.tall = nn.Linear(48, 97)
        self.square = nn.Linear(64, 64, bias=False)


def errors(merged: State, models: Mapping[str, nn.Module]) -> dict[str, float]:
    """Of every matrix, against TSV-M in float64; the float32 sum with the base included."""
    base, *experts = (m.state_dict() for m in models.values())
    found = {}
    for name, tensor in base.items():
        if tensor.ndim == 2:
            deltas = [(e[name].double() - tensor.double()).numpy() for e in experts]
            rank = min(tensor.shape) // len(experts)
            reference = oracle.tsvm(deltas, [rank] * len(experts))
            delta = (merged[name].double() - tensor.double()).numpy()
            found[name] = oracle.error(delta, reference)
    return found


def test_against_the_tsvm_of_fusion_bench() -> None:
    """The same mathematics: no further from float64 than twice FusionBench, embeddings apart."""
    torch.manual_seed(0)
    models: dict[str, nn.Module] = {"_pretrained_": Linears()}
    models |= {n: change(models["_pretrained_"], s) for s, n in enumerate(EXPERTS, start=1)}
    theirs = TaskSingularVectorMerging(alpha=1).run(
        fusion_bench.BaseModelPool({n: copy.deepcopy(m) for n, m in models.items()})
    )
    default = ResmKernelsMerging("tsvm").run(models)
    ours = ResmKernelsMerging("tsvm", {"exclude": []}).run(models)
    peer, own = errors(theirs.state_dict(), models), errors(ours.state_dict(), models)
    print(json.dumps({"fusion-bench": peer, "resm-kernels": own}, indent=1))
    assert {n: e for n, e in own.items() if e > 2 * peer[n]} == {}
    base, *experts = (m.state_dict() for m in models.values())
    for name in ("wide.bias", "tall.bias"):
        torch.testing.assert_close(ours.state_dict()[name], theirs.state_dict()[name])
    table = "embed_tokens.weight"
    assert_same(
        {k: v for k, v in default.state_dict().items() if k != table},
        {k: v for k, v in ours.state_dict().items() if k != table},
    )
    mean = sum(e[table].double() - base[table].double() for e in experts) / len(experts)
    torch.testing.assert_close(default.state_dict()[table].double(), base[table] + mean)
    assert errors(default.state_dict(), models)[table] > 0.1


def refusal(make: Callable[[], object]) -> str:
    with pytest.raises(UsageError) as caught:
        make()
    return str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"sigma": 2}, ["sigma", "method.parameters"]),
        ({"options": {"device": "cpu"}}, ["method.output"]),
        ({"return_model": False}, ["method.output"]),
        ({"output": "x", "options": {"devise": "cpu", "base": "b"}}, ["devise", "base", "device"]),
    ],
)
def test_arguments_that_cannot_be_meant(arguments: dict[str, Any], named: Sequence[str]) -> None:
    text = refusal(lambda: ResmKernelsMerging(**arguments))
    assert [word for word in named if word not in text] == []


@pytest.mark.parametrize(
    "arguments",
    [{"weights": [1.0]}, {"parameters": {"sigm": 1}}, {"method_name": "rems"}],
    ids=["weights", "parameters", "method"],
)
def test_mistakes_show_before_models_are_loaded(
    arguments: dict[str, Any], llamas: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CausalLMPool, "load_model", lambda *_: pytest.fail("loaded a model"))
    refusal(lambda: ResmKernelsMerging(**arguments).run(llama_pool(llamas)))


def test_pools_that_do_not_fit(
    modules: dict[str, nn.Module], llamas: dict[str, str], tmp_path: Path
) -> None:
    on_disk = ResmKernelsMerging(output=tmp_path / "merged")
    text = refusal(lambda: on_disk.run(modules))
    assert all(f"{name}: made by Mixed" in text for name in modules)
    peft = "fusion_bench.modelpool.causal_lm.load_peft_causal_lm"
    strange: dict[str, Any] = {
        **llamas,
        "math": {"_target_": peft, "base_model_path": "b", "peft_model_path": "p"},
        "code": {**causal_lm("org/code"), "subfolder": "inner"},
        "chat": causal_lm(llamas["chat"], "fusion_bench.some_function"),
    }
    text = refusal(lambda: on_disk.run(llama_pool(strange)))
    named = (f"math: made by {peft}", "code: subfolder=inner", "chat: made by fusion_bench.some")
    assert [part for part in named if part not in text] == []
    clip = CLIPVisionModelPool({"_pretrained_": "a/b", "c": "a/c"}, platform="modelscope")
    assert "c: a/c on ModelScope" in refusal(lambda: on_disk.run(clip))
    without = {name: path for name, path in llamas.items() if name != "_pretrained_"}
    assert "_pretrained_" in refusal(lambda: on_disk.run(llama_pool(without)))
    assert not (tmp_path / "merged").exists()


def test_revisions_are_part_of_the_repository(
    monkeypatch: pytest.MonkeyPatch, llamas: dict[str, str], tmp_path: Path
) -> None:
    """Of Hub repositories; a local folder has none."""
    asked: list[Any] = []

    def stop(base: str, experts: list[str], *_: Any, **__: Any) -> None:
        asked.extend([base, *experts])
        raise UsageError("seen")

    monkeypatch.setattr("resm_backends.fusion_bench.merge", stop)
    models = {
        "_pretrained_": "org/base",
        "math": {**causal_lm("org/math"), "revision": "v2"},
        "chat": llamas["chat"],
    }
    algorithm = ResmKernelsMerging(output=tmp_path / "merged")
    assert refusal(lambda: algorithm.run(llama_pool(models))) == "seen"
    assert asked == ["org/base", "org/math@v2", llamas["chat"]]
    asked.clear()
    refusal(lambda: algorithm.run(llama_pool(models, model_kwargs={"revision": "v1"})))
    assert asked == ["org/base@v1", "org/math@v1", llamas["chat"]]


def test_the_algorithm_as_a_config_and_back() -> None:
    algorithm = ResmKernelsMerging("tsvm", {"exclude": []}, [1.0, 2.0])
    again = fusion_bench.instantiate(algorithm.config)
    assert isinstance(again, ResmKernelsMerging)
    assert vars(again) == vars(algorithm)
