"""FusionBench: every method of resm-kernels as a FusionBench algorithm."""

from __future__ import annotations

import copy
import inspect
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from fusion_bench import BaseAlgorithm, BaseModelPool, auto_register_config
from fusion_bench.models.utils import get_target_state_dict, validate_target_modules_equal
from omegaconf import OmegaConf
from torch import nn
from transformers import PretrainedConfig

from resm_kernels import merge, merge_state_dicts
from resm_kernels.errors import UsageError
from resm_kernels.report.progress import LogProgress

log = logging.getLogger(__name__)

PRETRAINED = "_pretrained_"
PATH = "pretrained_model_name_or_path"
LOADER = ".from_pretrained"
OPTIONS = frozenset(inspect.signature(merge).parameters) - {
    "base", "experts", "output", "method", "recipe", "weights", "parameters", "progress",
}  # fmt: skip
"""What `options` may hold."""
ELSEWHERE = ("subfolder", "variant", "gguf_file")
"""Arguments of `from_pretrained` that choose other weights than the folder's own."""


@auto_register_config
class ResmKernelsMerging(BaseAlgorithm):
    """Merge the models of a pool by a method of resm-kernels.

    Parameters
    ----------
    method_name : str
        As `resm methods` lists them.
    parameters : mapping, optional
        The method's parameters, as for `resm_kernels.merge`.
    weights : sequence of float, optional
        One per expert, in the order of the pool's `model_names`; 1 each by default.
    output : path, optional
        A folder that does not exist yet: the checkpoints that the pool names are merged from disk
        to disk. Without it the models are loaded and merged in memory.
    options : mapping, optional
        With `output`: further keyword arguments of `resm_kernels.merge` (`device`, `out_dtype`,
        `memory_budget`, `resume`, ...).
    return_model : bool
        With `output`: false ends the run when the checkpoint is written, and loads nothing.

    Raises
    ------
    UsageError
        Where arguments cannot go together, or are not known.
    """

    def __init__(
        self,
        method_name: str = "resm",
        parameters: Mapping[str, Any] | None = None,
        weights: Sequence[float] | None = None,
        output: str | os.PathLike[str] | None = None,
        options: Mapping[str, Any] | None = None,
        return_model: bool = True,
        **kwargs: Any,
    ) -> None:
        unknown = sorted(key for key in kwargs if not key.startswith("_"))
        if unknown:
            raise UsageError(
                f"method: unknown {', '.join(unknown)}",
                fix="parameters of a merge method go under method.parameters",
            )
        super().__init__(**kwargs)
        self.method_name = method_name
        self.parameters = _plain(parameters) or {}
        self.weights = _plain(weights)
        self.output = None if output is None else os.path.abspath(os.path.expanduser(output))
        self.options = _plain(options) or {}
        self.return_model = return_model
        wrong = sorted(self.options.keys() - OPTIONS)
        if wrong:
            raise UsageError(
                f"method.options: unknown {', '.join(wrong)}",
                expected=f"some of {', '.join(sorted(OPTIONS))}",
            )
        if self.output is None and (self.options or not return_model):
            raise UsageError(
                "method: options and return_model=false are for merges from disk to disk",
                fix="give method.output, or leave them out",
            )

    def run(self, modelpool: BaseModelPool | Mapping[str, nn.Module]) -> nn.Module | None:
        """Merge the pool's experts into its `_pretrained_` model.

        Parameters
        ----------
        modelpool : BaseModelPool or mapping of str to Module
            Holds `_pretrained_` and at least one expert.

        Returns
        -------
        Module or None
            The merged model: with `output` as the pool loads it from that folder (None where
            `return_model` is false), otherwise the pretrained model with merged weights, a copy
            where the pool itself holds modules.

        Raises
        ------
        ResmError
            As `resm_kernels.merge`; UsageError where the pool does not fit.
        """
        if not isinstance(modelpool, BaseModelPool):
            modelpool = BaseModelPool(dict(modelpool))
        experts = list(modelpool.model_names)
        if not modelpool.has_pretrained or not experts:
            raise UsageError(
                f"the model pool needs {PRETRAINED} and at least one expert",
                got=", ".join(modelpool.all_model_names) or "no models",
            )
        if self.output is not None:
            return self._from_disk(modelpool, experts)
        return self._in_memory(modelpool, experts)

    def _from_disk(self, pool: BaseModelPool, experts: Sequence[str]) -> nn.Module | None:
        base, *others = _checkpoints(pool, (PRETRAINED, *experts))
        report = merge(
            base,
            others,
            self.output,
            self.method_name,
            weights=self.weights,
            parameters=self.parameters,
            progress=LogProgress(),
            **self.options,
        )
        rules = ", ".join(f"{count} {rule}" for rule, count in report.rules.items())
        log.info("merged %s in %.1f s: %s", self.output, report.seconds, rules)
        if not self.return_model:
            return None
        config = copy.deepcopy(pool.get_model_config(PRETRAINED, return_copy=False))
        if isinstance(config, str):
            config = self.output
        else:
            config[PATH] = self.output
        model: nn.Module = _eager(pool, {PRETRAINED: config}).load_pretrained_model()
        return model

    def _in_memory(self, pool: BaseModelPool, experts: Sequence[str]) -> nn.Module:
        # Mistakes in the arguments show before any model is loaded.
        self._merge_states({}, [{} for _ in experts])
        pool = _eager(pool, {name: pool._models[name] for name in (PRETRAINED, *experts)})
        model: nn.Module = pool.load_pretrained_model()
        if pool.has_instance_models:
            model = copy.deepcopy(model)
        modules = [pool.load_model(name) for name in experts]
        validate_target_modules_equal([model, *modules])
        base = get_target_state_dict(model)
        ties = _ties(base)
        states = [
            _without_ties(get_target_state_dict(module), ties, name)
            for name, module in zip(experts, modules, strict=True)
        ]
        config = getattr(model, "config", None)
        merged = self._merge_states(
            _without_ties(base, ties, PRETRAINED),
            states,
            config.to_dict() if isinstance(config, PretrainedConfig) else None,
        )
        merged.update({name: merged[owner] for name, owner in ties.items()})
        # Not strict: `_fusion_bench_target_modules` may name a part of the model only.
        model.load_state_dict(merged, strict=False)
        return model

    def _merge_states(
        self,
        base: Mapping[str, Any],
        experts: Sequence[Mapping[str, Any]],
        config: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        return merge_state_dicts(
            base,
            experts,
            self.method_name,
            weights=self.weights,
            parameters=self.parameters,
            config=config,
        )


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _checkpoints(pool: BaseModelPool, names: Sequence[str]) -> list[str]:
    """Where the models of a pool lie, as `resm_kernels.merge` takes it; UsageError names others."""
    found, misfits = [], []
    common = pool.get_model_kwargs() if hasattr(pool, "get_model_kwargs") else {}
    for name in names:
        config = pool.get_model_config(name, return_copy=False)
        settings = dict(common)
        if isinstance(config, str):
            path = config
        elif isinstance(config, Mapping) and isinstance(config.get(PATH), str):
            path = config[PATH]
            settings = {**config, **common}
            target = str(config.get("_target_"))
            if not target.endswith(LOADER) and not getattr(pool, "enable_lazy_loading", False):
                misfits.append(f"{name}: made by {target}")
        else:
            made = config.get("_target_") if isinstance(config, Mapping) else type(config).__name__
            misfits.append(f"{name}: made by {made}")
            continue
        misfits += [f"{name}: {key}={settings[key]}" for key in ELSEWHERE if settings.get(key)]
        if not os.path.exists(path):
            if getattr(pool, "_platform", "hf") == "modelscope":
                misfits.append(f"{name}: {path} on ModelScope")
            revision = settings.get("revision") or settings.get("hf_revision")
            path = f"{path}@{revision}" if revision else path
        found.append(path)
    if misfits:
        raise UsageError(
            "method.output: these models of the pool are not folders or Hub repositories as such",
            got="; ".join(misfits),
            fix="leave method.output out, and the models are loaded and merged in memory",
        )
    return found


def _eager(pool: BaseModelPool, models: Mapping[str, Any]) -> BaseModelPool:
    """The pool with these models, which it loads as modules even where it would be lazy."""
    eager = copy.copy(pool)
    eager._models = dict(models)
    if getattr(pool, "enable_lazy_loading", False):
        eager.enable_lazy_loading = False
        eager._models = {name: _as_loader(config) for name, config in models.items()}
    return eager


def _as_loader(config: Any) -> Any:
    """A lazy pool's config, which may name a class, as one that makes the model."""
    target = config.get("_target_") if isinstance(config, Mapping) else None
    if target is None or target.endswith(LOADER):
        return config
    return OmegaConf.create({**config, "_target_": target + LOADER})


def _ties(state: Mapping[str, Any]) -> dict[str, str]:
    """Names of tensors that are one with an earlier tensor, by that one's name."""
    first: dict[Any, str] = {}
    ties = {}
    for name, tensor in state.items():
        if isinstance(tensor, torch.Tensor) and tensor.numel():
            place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            owner = first.setdefault(place, name)
            if owner != name:
                ties[name] = owner
    return ties


def _without_ties(state: Mapping[str, Any], ties: Mapping[str, str], who: str) -> dict[str, Any]:
    """A state in which each tied tensor appears once; UsageError where one has two values."""
    split = [
        f"{name} and {owner}"
        for name, owner in ties.items()
        if name in state and owner in state and not torch.equal(state[name], state[owner])
    ]
    if split:
        raise UsageError(
            f"{who}: weights that are tied in {PRETRAINED} differ", got="; ".join(split)
        )
    return {name: value for name, value in state.items() if name not in ties}
