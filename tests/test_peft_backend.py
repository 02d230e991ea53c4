"""Adapters merged into one adapter, against float64 on whole matrices and against PEFT itself."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file

from resm_backends import peft as backend
from resm_backends.peft import factored_stats, merge_adapters
from resm_kernels.checkpoint.hub import ModelReference
from resm_kernels.checkpoint.lora import Adapter, open_model, read_adapter, read_factors
from resm_kernels.checkpoint.reader import open_checkpoint
from resm_kernels.errors import CheckpointError, NonFiniteError, OutputError, UsageError
from resm_kernels.linalg import FactoredDelta
from resm_kernels.methods import find_method, merge_weight
from resm_kernels.ops.delta_stats import delta_stats
from tests.adapters import gpt2, llama, read_state, train, write_adapter
from tests.checkpoints import contents

pytestmark = pytest.mark.filterwarnings("ignore")
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "one set of modules": [{"target_modules": ["q_proj", "up_proj"]}] * 3,
    "different modules, ranks and scales": [
        {"target_modules": ["q_proj", "up_proj"], "r": 2},
        {"target_modules": ["q_proj", "down_proj"], "use_rslora": True},
        {"target_modules": ["q_proj"], "alpha_pattern": {"layers.0.self_attn.q_proj": 1}},
    ],
    "tables": [{"target_modules": ["embed_tokens", "q_proj"]}, {"target_modules": ["lm_head"]}],
}
WEIGHTS = [0.9, -0.4, 1.3]


def make_adapters(folder: Path, settings: list[dict[str, Any]], make: Any = llama) -> list[Path]:
    trained = [
        train(make(), folder / str(i), seed=i, **options) for i, options in enumerate(settings)
    ]
    return [adapter for _, adapter, _ in trained]


def dense(adapter: Adapter, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The delta of PEFT's layer in float64."""
    if name not in adapter.pairs:
        return torch.zeros(shape, dtype=torch.float64)
    left, right = read_factors(adapter, adapter.pairs[name])
    return left.double() @ right.double().T


def truncated(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, float]:
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    lost = float(torch.linalg.vector_norm(s[rank:]) / torch.linalg.vector_norm(s))
    return (u[:, :rank] * s[:rank]) @ vt[:rank], lost


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("task_arithmetic", {"lambda": 0.7}),
        ("task_arithmetic", {"normalize": True}),
        ("tsvm", {"lambda": 0.7}),
        ("tsvm", {"exclude": []}),
        ("resm", {}),
        ("resm", {"outlier_score": "count", "rank": "energy", "rank_energy": 0.6}),
        ("resm", {"outlier_score": "mass", "rank": "fixed", "rank_fraction": 0.4}),
    ],
)
def test_the_merged_adapter_is_the_dense_merge_truncated(
    setting: str, method: Any, parameters: dict[str, object], tmp_path: Path
) -> None:
    """Against the engine's own mathematics on whole float64 deltas over a base of zeros."""
    paths = make_adapters(tmp_path, SETTINGS[setting])
    weights = WEIGHTS[: len(paths)]
    report = merge_adapters(
        paths, tmp_path / "out", rank=3, method=method, weights=weights, parameters=parameters
    )
    adapters, merged = [read_adapter(path) for path in paths], read_adapter(tmp_path / "out")
    chosen = find_method(method)
    assert set(report.modules) == set(merged.pairs) == {n for a in adapters for n in a.pairs}
    for name, found in report.modules.items():
        deltas = [dense(adapter, name, found.shape) for adapter in adapters]
        zeros = torch.zeros(found.shape, dtype=torch.float64)
        options = chosen.make_options(parameters, len(adapters))
        whole = merge_weight(chosen, name, zeros, deltas, weights, options, torch.float64)
        expected, lost = truncated(whole.tensor, 3)
        mine = dense(merged, name, found.shape)
        assert torch.linalg.norm(mine - expected) <= 3e-6 * torch.linalg.norm(expected), name
        assert found.truncation_error == pytest.approx(lost, rel=1e-5, abs=1e-6)
        assert found.rule == whole.rule
        assert found.adapters == sum(name in adapter.pairs for adapter in adapters)
        assert merged.pairs[name].scale == 1.0


@pytest.mark.parametrize("make", [llama, gpt2], ids=["Llama", "GPT-2"])
def test_peft_loads_it_and_merges_it_into_the_model(make: Any, tmp_path: Path) -> None:
    """Also the tables of GPT-2, which PEFT keeps as `lora_embedding_A` and `_B`."""
    modules = ["q_proj", "embed_tokens"] if make is llama else ["c_attn", "c_proj", "wte"]
    paths = make_adapters(tmp_path, [{"target_modules": modules}] * 2, make)
    merge_adapters(paths, tmp_path / "out", rank=2, method="task_arithmetic", weights=[0.5, 0.5])
    before = {name: t.clone() for name, t in make().state_dict().items()}
    loaded = PeftModel.from_pretrained(make(), str(tmp_path / "out"))
    after = loaded.merge_and_unload().state_dict()
    adapters = [read_adapter(path) for path in paths]
    changed = 0
    for name, weight in after.items():
        turned = make is gpt2 and "wte" not in name
        if name not in adapters[0].pairs:
            if name != "lm_head.weight" or make is llama:
                assert torch.equal(weight, before[name]), name
            continue
        shape = adapters[0].pairs[name].shape
        expected, _ = truncated(sum(0.5 * dense(a, name, shape) for a in adapters), 2)  # type: ignore[arg-type]
        delta = weight.double() - before[name].double()
        error = torch.linalg.norm((delta.T if turned else delta) - expected)
        assert error <= 1e-6 * torch.linalg.norm(weight), name
        changed += 1
    assert changed == len(adapters[0].pairs) > 2


def test_it_computes_what_pefts_own_svd_does(tmp_path: Path) -> None:
    paths = make_adapters(tmp_path, [{"target_modules": ["q_proj", "down_proj"]}] * 3)
    merge_adapters(paths, tmp_path / "out", rank=2, method="task_arithmetic", weights=WEIGHTS)
    model = PeftModel.from_pretrained(llama(), str(paths[0]), adapter_name="a0")
    for i, path in enumerate(paths[1:], 1):
        model.load_adapter(str(path), adapter_name=f"a{i}")
    names = [f"a{i}" for i in range(3)]
    model.add_weighted_adapter(names, WEIGHTS, "mix", combination_type="svd", svd_rank=2)
    merged = read_adapter(tmp_path / "out")
    for name, module in model.base_model.model.named_modules():
        if f"{name}.weight" in merged.pairs:
            b, a = module.lora_B["mix"].weight.double(), module.lora_A["mix"].weight.double()
            theirs = (b @ a).detach() * module.scaling["mix"]
            mine = dense(merged, f"{name}.weight", theirs.shape)
            assert torch.linalg.norm(mine - theirs) <= 1e-5 * torch.linalg.norm(theirs)


def test_the_bytes_do_not_change_from_run_to_run(tmp_path: Path) -> None:
    paths = make_adapters(tmp_path, SETTINGS["tables"])
    for name in ("x", "y"):
        merge_adapters(paths, tmp_path / name, rank=3, method="resm")
    assert contents(tmp_path / "x") == contents(tmp_path / "y")
    assert set(contents(tmp_path / "x")) == {"adapter_config.json", "adapter_model.safetensors"}


def test_the_output_opens_as_an_expert(tmp_path: Path) -> None:
    base, adapter, _ = train(gpt2(), tmp_path, target_modules=["c_attn"])
    merge_adapters([adapter], tmp_path / "out", rank=2, out_dtype="bfloat16")
    opened = open_checkpoint(ModelReference(str(base)))
    found = open_model(ModelReference(str(tmp_path / "out")), opened)
    assert isinstance(found, Adapter)
    assert {p.a.dtype.name for p in found.pairs.values()} == {"BF16"}
    assert all(p.transposed for p in found.pairs.values())


def one(folder: Path, rank: int = 2, value: float = 1.0, out: int = 6, **config: object) -> Path:
    generator = torch.Generator().manual_seed(3)
    tensors = {
        "base_model.model.m.lora_A.weight": value * torch.randn(rank, 8, generator=generator),
        "base_model.model.m.lora_B.weight": torch.randn(out, rank, generator=generator),
    }
    return write_adapter(folder, tensors, {"r": rank, **config})


@pytest.mark.parametrize("method", ["tsvm", "resm", "task_arithmetic"])
def test_degenerate_adapters(method: Any, tmp_path: Path) -> None:
    """No change at all, equal adapters, factors wider than the weight."""
    still = one(tmp_path / "still", value=0.0)
    report = merge_adapters([still, still], tmp_path / "a", rank=4, method=method)
    assert report.modules["m.weight"].rank == 0
    assert report.modules["m.weight"].truncation_error == 0.0
    assert all(not t.any() for t in read_state(tmp_path / "a").values())
    moved = one(tmp_path / "moved", rank=12)
    report = merge_adapters([moved, moved, still], tmp_path / "b", rank=6, method=method)
    assert report.modules["m.weight"].rank <= 6
    assert report.modules["m.weight"].truncation_error == 0.0
    assert read_adapter(tmp_path / "b").pairs["m.weight"].rank == 6


def test_statistics_of_factors_are_those_of_the_dense_delta(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(n, 3, generator=generator).double() for n in (37, 11))
    zeros = torch.zeros(37, 11, dtype=torch.float64)
    (whole,) = delta_stats(zeros, [left @ right.T], sigma=2.0, noise_floor=0.2)
    for panel in (1, 64, 1 << 20):
        monkeypatch.setattr(backend, "PANEL", panel)
        found = factored_stats(FactoredDelta(left, right), sigma=2.0, noise_floor=0.2)
        for name, value in vars(whole).items():
            assert getattr(found, name) == pytest.approx(value, rel=1e-12), name
        assert found.outlier_count > 0
        assert found.sparse_count > 0


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": True}, "rank"),
        ({"rank": 7}, "at most 6"),
        ({"method": "ties"}, "ties"),
        ({"weights": [1.0]}, "weights"),
        ({"weights": [1.0, "2"]}, "weights"),
        ({"weights": [1.0, float("nan")]}, "weights"),
        ({"parameters": {"sigmoid": 1}}, "sigmoid"),
        ({"method": "resm", "parameters": {"mask_noise": True}}, "mask_noise"),
        ({"out_dtype": "int8"}, "out_dtype"),
    ],
)
def test_arguments_that_cannot_be_meant(change: dict[str, Any], word: str, tmp_path: Path) -> None:
    paths = [one(tmp_path / "a"), one(tmp_path / "b")]
    with pytest.raises(UsageError) as caught:
        merge_adapters(paths, tmp_path / "out", **{"rank": 2, **change})
    assert word in str(caught.value)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="adapters: got"):
        merge_adapters(str(paths[0]), tmp_path / "out", rank=2)
    with pytest.raises(UsageError, match="no adapters"):
        merge_adapters([], tmp_path / "out", rank=2)


def test_adapters_that_cannot_be_merged_without_their_base(tmp_path: Path) -> None:
    _, folder, _ = train(llama(), tmp_path, target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(CheckpointError, match="modules_to_save"):
        merge_adapters([folder], tmp_path / "out", rank=2)
    with pytest.raises(CheckpointError, match=r"m\.weight: \(7, 8\)"):
        merge_adapters([one(tmp_path / "x"), one(tmp_path / "y", out=7)], tmp_path / "out", rank=2)
    with pytest.raises(NonFiniteError, match="module 'm'"):
        merge_adapters([one(tmp_path / "z", value=float("nan"))], tmp_path / "out", rank=2)
    with pytest.raises(NonFiniteError, match="outside the range of F16"):
        merge_adapters(
            [one(tmp_path / "w", value=1e20)], tmp_path / "out", rank=2, out_dtype="float16"
        )
    assert not list(tmp_path.glob("out*"))


def test_a_copy_of_an_embedding_is_carried_along(tmp_path: Path) -> None:
    """PEFT stores the untrained table beside the factors: a resized vocabulary needs it."""
    paths = make_adapters(tmp_path, [{"target_modules": ["embed_tokens"]}] * 2)
    merge_adapters(paths, tmp_path / "out", rank=2)
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    assert torch.equal(read_state(tmp_path / "out")[name], read_state(paths[0])[name])
    state = read_state(paths[1])
    save_file({**state, name: state[name] + 1}, paths[1] / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="another copy"):
        merge_adapters(paths, tmp_path / "out2", rank=2)


def test_an_output_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fills at every sync in turn."""
    path = one(tmp_path / "a")
    real, left = os.fsync, 0

    def full(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    failures: list[str] = []
    for allowed in range(50):
        left, out = allowed, tmp_path / f"out{allowed}"
        try:
            merge_adapters([path], out, rank=2)
            break
        except OutputError as error:
            failures.append(str(error))
        assert not out.exists() or len(contents(out)) == 2
    assert all("No space left" in failure for failure in failures)
    assert len(failures) > 5
    assert read_adapter(out).pairs
    with pytest.raises(OutputError, match="exists and is not empty"):
        merge_adapters([path], out, rank=2)
    with pytest.raises(OutputError, match="lies in the input"):
        merge_adapters([path], path / "out", rank=2)


def test_peft_reads_the_config_that_is_written(tmp_path: Path) -> None:
    merge_adapters([one(tmp_path / "a", fan_in_fan_out=True)], tmp_path / "out", rank=2)
    config = LoraConfig.from_pretrained(str(tmp_path / "out"))
    assert (config.r, config.lora_alpha, config.fan_in_fan_out) == (2, 2, True)
    model = torch.nn.ModuleDict({"m": torch.nn.Linear(8, 6)})
    assert get_peft_model(model, config).base_model.model["m"].scaling["default"] == 1.0
