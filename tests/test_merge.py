"""`merge` end to end on checkpoints on disk."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import resm_kernels
from resm_kernels.api import merge_state_dicts
from resm_kernels.checkpoint.files import unseal
from resm_kernels.engine import executor, flow
from resm_kernels.errors import CheckpointError, NonFiniteError, OutputError, PlanError
from tests.checkpoints import contents, fine_tuned, make_state, save, save_family

METHODS = ["resm", "tsvm", "iso_c", "task_arithmetic", "linear"]
MODEL_FILES = {"config.json", "README.md", "model.safetensors", "resm_manifest.json"}
REPORTS = {"resm_report.json", "resm_report.html"}


def load(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        state.update(load_file(file))
    return state


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shards", [1, 3])
def test_disk_and_memory_give_the_same_tensors(method: str, shards: int, tmp_path: Path) -> None:
    base, experts = save_family(tmp_path, shards=shards)
    report = resm_kernels.merge(base, experts, tmp_path / "out", method)
    merged = load(tmp_path / "out")
    expected = merge_state_dicts(load(base), [load(e) for e in experts], method)
    assert merged.keys() == expected.keys() == report.tensors.keys()
    assert all(torch.equal(merged[name], expected[name]) for name in merged)
    assert not (tmp_path / "out.partial").exists()


def test_two_runs_give_the_same_bytes_but_for_the_report(tmp_path: Path) -> None:
    base, experts = save_family(tmp_path)
    for name, workers in (("one", 1), ("two", 4)):
        resm_kernels.merge(base, experts, tmp_path / name, workers=workers)
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert one.keys() == two.keys() == MODEL_FILES | REPORTS
    assert {name for name in one if one[name] != two[name]} == REPORTS


@pytest.mark.parametrize("size", ["1B", "600B", "2KB", "1GB"])
def test_shard_size_changes_files_not_tensors(size: str, tmp_path: Path) -> None:
    base, experts = save_family(tmp_path)
    resm_kernels.merge(base, experts, tmp_path / "whole")
    resm_kernels.merge(base, experts, tmp_path / "split", shard_size=size)
    whole, split = load(tmp_path / "whole"), load(tmp_path / "split")
    assert whole.keys() == split.keys()
    assert all(torch.equal(whole[name], split[name]) for name in whole)
    if size != "1GB":
        index = json.loads((tmp_path / "split" / "model.safetensors.index.json").read_text())
        for name, file in index["weight_map"].items():
            with safe_open(tmp_path / "split" / file, framework="pt") as shard:
                assert name in shard.keys()  # noqa: SIM118


@pytest.mark.parametrize("out", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_float_dtype_in_and_out(stored: torch.dtype, out: str, tmp_path: Path) -> None:
    state = make_state(dtype=stored)
    base = save(tmp_path / "base", state)
    expert = save(tmp_path / "expert", fine_tuned(state, 1))
    resm_kernels.merge(base, [expert], tmp_path / "out", "task_arithmetic", out_dtype=out)
    merged = load(tmp_path / "out")
    for name, value in load(expert).items():
        assert merged[name].dtype == getattr(torch, out)
        wide = torch.float64 if stored == torch.float64 else torch.float32
        start = state[name].to(wide)
        assert torch.equal(merged[name], (start + (value.to(wide) - start)).to(getattr(torch, out)))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == out


def test_mixed_dtypes_keep_the_base_s(tmp_path: Path) -> None:
    state = make_state(dtype=torch.float32)
    mixed = {n: t.bfloat16() if "mlp" in n else t for n, t in state.items()}
    base = save(tmp_path / "base", mixed)
    expert = save(tmp_path / "expert", fine_tuned(state, 1))
    resm_kernels.merge(base, [expert], tmp_path / "out", "tsvm")
    assert {n: t.dtype for n, t in load(tmp_path / "out").items()} == {
        n: t.dtype for n, t in mixed.items()
    }


def test_integer_and_bool_tensors_come_from_the_base(tmp_path: Path) -> None:
    state = make_state()
    state["model.positions"] = torch.arange(5)
    state["model.mask"] = torch.tensor([True, False])
    base = save(tmp_path / "base", state)
    other = {**fine_tuned(state, 1), "model.positions": torch.zeros(5, dtype=torch.int64)}
    report = resm_kernels.merge(base, [save(tmp_path / "e", other)], tmp_path / "out")
    merged = load(tmp_path / "out")
    assert torch.equal(merged["model.positions"], state["model.positions"])
    assert torch.equal(merged["model.mask"], state["model.mask"])
    assert report.tensors["model.mask"].rule == "copy"


def test_empty_scalar_and_higher_dimensional_tensors(tmp_path: Path) -> None:
    shapes = {"empty": (0, 4), "scalar": (), "stack": (3, 8, 8), "matrix": (8, 8)}
    state = make_state(dtype=torch.float32, shapes=shapes)
    experts = [save(tmp_path / f"e{t}", fine_tuned(state, t)) for t in (1, 2)]
    resm_kernels.merge(save(tmp_path / "base", state), experts, tmp_path / "out")
    merged = load(tmp_path / "out")
    assert {n: tuple(t.shape) for n, t in merged.items()} == shapes
    mean = sum(load(e)["stack"].double() for e in experts) / 2
    assert torch.allclose(merged["stack"].double(), mean, atol=1e-6)


def save_bin(folder: Path, state: dict[str, torch.Tensor], config: object) -> Path:
    folder.mkdir()
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_bin_checkpoints_give_the_bytes_of_safetensors_ones(tmp_path: Path) -> None:
    base, experts = save_family(tmp_path, experts=2)
    for folder in (base, *experts):
        state = {n: t.T.contiguous().T if t.ndim == 2 else t for n, t in load(folder).items()}
        save_bin(tmp_path / f"{folder.name}-bin", state, {"model_type": "llama"})
    resm_kernels.merge(base, experts, tmp_path / "one")
    bins = [tmp_path / f"{e.name}-bin" for e in experts]
    resm_kernels.merge(tmp_path / "base-bin", bins, tmp_path / "two")
    one, two = load(tmp_path / "one"), load(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


TIED = {"model_type": "llama", "tie_word_embeddings": True, "vocab_size": 40}
FILTERED = [{"filter": "lm_head", "value": 0.25}, {"value": 1.0}]


def test_a_tied_head_that_an_expert_stores_is_left_out_by_name(tmp_path: Path) -> None:
    state = make_state()
    del state["lm_head.weight"]
    base = save(tmp_path / "base", state, config=TIED)
    tuned = fine_tuned(state, 1)
    tuned["lm_head.weight"] = tuned["model.embed_tokens.weight"].clone()
    expert = save(tmp_path / "expert", tuned, config=TIED)
    report = resm_kernels.merge(base, [expert], tmp_path / "out")
    assert "lm_head.weight" not in load(tmp_path / "out")
    assert list(report.left_out.values()) == ["tied to model.embed_tokens.weight"]

    tuned["lm_head.weight"] = tuned["lm_head.weight"] + 1
    untied = save(tmp_path / "untied", tuned, config=TIED)
    with pytest.raises(PlanError, match=r"lm_head.weight: in .*untied, not in the base"):
        resm_kernels.merge(base, [untied], tmp_path / "out2")


def test_a_tied_head_that_the_base_stores_stays_tied(tmp_path: Path) -> None:
    state = make_state()
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    base = save(tmp_path / "base", state, config=TIED)
    tuned = fine_tuned(state, 1)
    del tuned["lm_head.weight"]
    expert = save(tmp_path / "expert", tuned, config=TIED)
    resm_kernels.merge(base, [expert], tmp_path / "out", parameters={"lambda": FILTERED})
    merged = load(tmp_path / "out")
    assert torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])
    assert not torch.equal(merged["lm_head.weight"], state["lm_head.weight"])


def test_an_expert_that_untied_the_head_is_refused(tmp_path: Path) -> None:
    state = make_state()
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    base = save(tmp_path / "base", state, config=TIED)
    expert = save(tmp_path / "expert", fine_tuned(state, 1), config=TIED)
    with pytest.raises(PlanError, match=r"tied to lm_head\.weight in the base, but not in"):
        resm_kernels.merge(base, [expert], tmp_path / "out")


def test_equal_matrices_that_are_no_embeddings_are_not_tied(tmp_path: Path) -> None:
    """All-zero matrices that happen to have vocab_size rows keep parameters of their own."""
    names = [f"layers.{i}.o.weight" for i in range(3)]
    state = {name: torch.zeros(16, 16) for name in names}
    config = {"tie_word_embeddings": True, "vocab_size": 16}
    base = save(tmp_path / "base", state, config=config)
    tuned = {name: torch.ones(16, 16) for name in names}
    expert = save(tmp_path / "e", tuned, config=config)
    settings = {"lambda": [0.0, 1.0]}
    resm_kernels.merge(base, [expert], tmp_path / "out", "task_arithmetic", parameters=settings)
    merged = load(tmp_path / "out")
    assert [float(merged[name][0, 0]) for name in names] == [0.0, 0.5, 1.0]


def test_weights_that_share_storage_in_a_bin_stay_tied(tmp_path: Path) -> None:
    folders = []
    for seed in (0, 1):
        state = fine_tuned(make_state(), seed + 5)
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
        folders.append(save_bin(tmp_path / f"m{seed}", state, {"model_type": "llama"}))
    resm_kernels.merge(folders[0], folders[1:], tmp_path / "out", parameters={"lambda": FILTERED})
    merged = load(tmp_path / "out")
    assert torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])


def test_aliases_that_safetensors_records_survive(tmp_path: Path) -> None:
    state = make_state()
    del state["lm_head.weight"]
    for name in ("base", "expert"):
        folder = save(tmp_path / name, fine_tuned(state, len(name)))
        notes = {"format": "pt", "lm_head.weight": "model.embed_tokens.weight"}
        save_file(load(folder), folder / "model.safetensors", metadata=notes)
    resm_kernels.merge(tmp_path / "base", [tmp_path / "expert"], tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert file.metadata()["lm_head.weight"] == "model.embed_tokens.weight"


def test_missing_and_extra_tensors_are_named_and_can_be_allowed(tmp_path: Path) -> None:
    state = make_state()
    base = save(tmp_path / "base", state)
    tuned = fine_tuned(state, 1)
    del tuned["model.norm.weight"]
    tuned["model.rotary.inv_freq"] = torch.ones(4)
    tuned["lm_head.weight"] = torch.zeros(41, 16)
    with pytest.raises(PlanError) as caught:
        resm_kernels.merge(base, [save(tmp_path / "e", tuned)], tmp_path / "out")
    for name in ("model.norm.weight", "model.rotary.inv_freq", "lm_head.weight: shape [41, 16]"):
        assert name in str(caught.value)
    assert not (tmp_path / "out").exists()

    tuned["lm_head.weight"] = fine_tuned(state, 2)["lm_head.weight"]
    expert = save(tmp_path / "e", tuned)
    report = resm_kernels.merge(
        base, [expert], tmp_path / "out", allow_missing=True, allow_extra=True
    )
    assert torch.equal(load(tmp_path / "out")["model.norm.weight"], state["model.norm.weight"])
    assert report.tensors["model.norm.weight"].rule == "copy"
    assert list(report.left_out) == [f"{expert}: model.rotary.inv_freq"]


def test_nan_is_an_error_that_names_tensor_and_file(tmp_path: Path) -> None:
    state = make_state()
    base = save(tmp_path / "base", state)
    tuned = fine_tuned(state, 1)
    name = "model.layers.1.mlp.up_proj.weight"
    tuned[name][3, 4] = float("nan")
    tuned[name][0, 0] = float("inf")
    expert = save(tmp_path / "expert", tuned)
    with pytest.raises(NonFiniteError, match="2 of 384 values are NaN or Inf") as caught:
        resm_kernels.merge(base, [expert], tmp_path / "out")
    assert name in str(caught.value)
    assert str(expert / "model.safetensors") in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("method", METHODS)
def test_nonfinite_warn_keeps_the_base_s_value_there(method: str, tmp_path: Path) -> None:
    state = make_state()
    name = "model.layers.1.mlp.up_proj.weight"
    clean = fine_tuned(state, 1)
    clean[name][3, 4] = state[name][3, 4]
    broken = {**clean, name: clean[name].clone()}
    broken[name][3, 4] = float("nan")
    base = save(tmp_path / "base", state)
    report = resm_kernels.merge(
        base, [save(tmp_path / "broken", broken)], tmp_path / "out", method, nonfinite="warn"
    )
    merged = load(tmp_path / "out")
    assert torch.equal(merged[name][3, 4], state[name][3, 4])
    assert all(bool(torch.isfinite(t).all()) for t in merged.values())
    assert "1 values are NaN or Inf" in report.notes[name][0]
    if method != "resm":
        resm_kernels.merge(base, [save(tmp_path / "clean", clean)], tmp_path / "same", method)
        same = load(tmp_path / "same")
        rest = torch.ones_like(merged[name], dtype=torch.bool)
        rest[3, 4] = False
        assert torch.equal(merged[name][rest], same[name][rest])


def test_copies_are_screened_like_merges(tmp_path: Path) -> None:
    """A tensor that an expert lacks is copied, but not past the NaN and overflow checks."""
    state = {"w": torch.ones(4, 4), "only": torch.tensor([1e6, float("nan")])}
    base = save(tmp_path / "base", state)
    expert = save(tmp_path / "e", {"w": torch.ones(4, 4)})
    more = {"allow_missing": True, "out_dtype": "float16"}
    with pytest.raises(NonFiniteError, match="'only': 1 of 2 values are NaN"):
        resm_kernels.merge(base, [expert], tmp_path / "out", **more)
    report = resm_kernels.merge(base, [expert], tmp_path / "out", nonfinite="warn", **more)
    assert len(report.notes["only"]) == 2


def test_linear_with_a_broken_base_uses_the_experts_alone(tmp_path: Path) -> None:
    base = save(tmp_path / "base", {"w": torch.full((4, 4), float("nan"))})
    expert = save(tmp_path / "e", {"w": torch.ones(4, 4)})
    for policy in ("error", "warn"):
        output = tmp_path / policy
        resm_kernels.merge(base, [expert], output, "linear", nonfinite=policy)
        assert torch.equal(load(output)["w"], torch.ones(4, 4))


def test_output_overflow_is_an_error(tmp_path: Path) -> None:
    state = {"w": torch.full((4, 4), 6e4)}
    base = save(tmp_path / "base", state)
    expert = save(tmp_path / "e", {"w": torch.full((4, 4), 1e5)})
    with pytest.raises(NonFiniteError, match=r"'w': 16 merged values do not fit F16"):
        resm_kernels.merge(base, [expert], tmp_path / "out", "linear", out_dtype="float16")


def test_file_modes_follow_the_umask(tmp_path: Path) -> None:
    base, experts = save_family(tmp_path)
    before = os.umask(0o027)
    try:
        resm_kernels.merge(base, experts, tmp_path / "out")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "out").iterdir()}
    assert modes == {0o640}
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750


def test_companion_files_are_copied_and_code_only_where_needed(tmp_path: Path) -> None:
    base, experts = save_family(tmp_path)
    (base / "tokenizer.json").write_text('{"version": "1.0"}')
    (base / "generation_config.json").write_text("{}")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool.jinja").write_text("x")
    (base / "modeling_x.py").write_text("raise SystemExit")
    (base / "optimizer.pt").write_bytes(b"no")
    resm_kernels.merge(base, experts, tmp_path / "out")
    found = set(contents(tmp_path / "out"))
    companions = {
        "tokenizer.json",
        "generation_config.json",
        "additional_chat_templates/tool.jinja",
    }
    assert found == MODEL_FILES | REPORTS | companions
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    (base / "config.json").write_text('{"auto_map": {"AutoModel": "modeling_x.X"}}')
    resm_kernels.merge(base, experts, tmp_path / "coded")
    assert (tmp_path / "coded" / "modeling_x.py").exists()
    assert resm_kernels.verify(tmp_path / "coded").files == len(contents(tmp_path / "coded"))


@pytest.mark.parametrize("moment", ["MemoryWatch", "merge_planned", "last"])
def test_inputs_that_change_during_the_merge_are_noticed(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two reads, and, for the last tensor, after the reads and before the end."""
    base, experts = save_family(tmp_path)
    room, name = {
        "MemoryWatch": (executor, moment),
        "merge_planned": (flow, moment),
        "last": (executor.MemoryWatch, "stop"),
    }[moment]
    original = getattr(room, name)

    def tamper(*arguments: object, **options: object) -> object:
        with open(experts[0] / "model.safetensors", "r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\0")
        return original(*arguments, **options)

    monkeypatch.setattr(room, name, tamper)
    with pytest.raises(CheckpointError, match="changed after the merge was planned"):
        resm_kernels.merge(base, experts, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_symlinked_hub_cache_is_read(tmp_path: Path) -> None:
    """The Hub's cache holds snapshots as links to blobs outside the snapshot folder."""
    base, experts = save_family(tmp_path)
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for file in experts[0].iterdir():
        (snapshot / file.name).symlink_to(file)
    resm_kernels.merge(base, [snapshot, experts[1]], tmp_path / "out")
    assert resm_kernels.verify(tmp_path / "out").tensors == 9


def test_hub_ids_resolve_from_the_cache_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    base, experts = save_family(tmp_path)
    root = tmp_path / "hub" / "models--org--expert"
    snapshot = root / "snapshots" / ("c" * 40)
    snapshot.parent.mkdir(parents=True)
    experts[0].rename(snapshot)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("c" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    report = resm_kernels.merge(base, ["org/expert@main", experts[1]], tmp_path / "out")
    assert report.recipe["models"][0] == {"model": "org/expert@main"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model:\n- org/expert\n" in card
    with pytest.raises(CheckpointError, match=r"org/absent: no such folder here, not in the Hub"):
        resm_kernels.merge(base, ["org/absent"], tmp_path / "out2")


def test_the_manifest_lists_every_tensor_with_what_was_done(tmp_path: Path) -> None:
    base, experts = save_family(tmp_path)
    report = resm_kernels.merge(base, experts, tmp_path / "out")
    manifest = unseal(tmp_path / "out" / "resm_manifest.json")
    assert manifest["tensors"].keys() == report.tensors.keys()
    entry = manifest["tensors"]["model.layers.0.mlp.up_proj.weight"]
    assert entry["rule"] == "resm"
    assert len(entry["ranks"]) == len(entry["weights"]) == 3
    assert "seconds" not in entry
    assert manifest["tensors"]["lm_head.weight"]["reason"] == "excluded by *lm_head*"


def test_output_folder_rules(tmp_path: Path) -> None:
    base, experts = save_family(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("keep")
    for output in (tmp_path / "full", base / "out", base, tmp_path / "no" / "such"):
        with pytest.raises(OutputError):
            resm_kernels.merge(base, experts, output)
    assert (tmp_path / "full" / "x").read_text() == "keep"
    (tmp_path / "empty").mkdir()
    resm_kernels.merge(base, experts, tmp_path / "empty")
    assert resm_kernels.verify(tmp_path / "empty").tensors == 9


def test_tied_tensors_stay_tied_in_memory() -> None:
    """Also by random drops, whose key is the name."""
    base, *experts = (make_state(seed) for seed in range(3))
    for state in (base, *experts):
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    merged = merge_state_dicts(base, experts, "dare_linear", parameters={"density": 0.5})
    assert merged["lm_head.weight"] is merged["model.embed_tokens.weight"]
    experts[1]["lm_head.weight"] = experts[1]["lm_head.weight"].clone()
    merged = merge_state_dicts(base, experts, "dare_linear", parameters={"density": 0.5})
    assert not torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])
