"""The model card of a merged checkpoint."""

from __future__ import annotations

import yaml
from huggingface_hub import ModelCard, ModelCardData

from resm_kernels import __version__
from resm_kernels.checkpoint.hub import ModelReference
from resm_kernels.engine.result import MergeReport
from resm_kernels.methods import METHODS

RECONSTRUCTION = (
    "RESM's paper is public but its equations were not available to us: this is a "
    "reconstruction from its description, with every choice a named parameter."
)


def model_card(report: MergeReport) -> bytes:
    """Write README.md: what was merged, by which method and recipe; the same in every run."""
    method = METHODS[report.method]
    recipe = report.recipe
    names = [entry["model"] for entry in recipe["models"]]
    base = recipe.get("base_model", names[0])
    models = list(dict.fromkeys([base, *names]))
    references = [ModelReference(name) for name in models]
    hub_ids = [r.repo[0] for r in references if r.repo is not None and not r.exists()]
    part = report.part
    data = ModelCardData(
        base_model=hub_ids or None,
        library_name=None if part else "transformers",
        tags=["merge", "resm-kernels", report.method, *(["part-of-a-merge"] if part else [])],
    )
    rules = "\n".join(f"| {rule} | {count} |" for rule, count in sorted(report.rules.items()))
    notes = sum(len(notes) for notes in report.notes.values())
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# {'Part of a ' if part else ''}{report.method} merge of {len(names)} models",
        f"**No whole model**: {part['tensors']} of {part['of']} tensors, those named "
        f"{', '.join(f'`{pattern}`' for pattern in part['only'])}."
        if part
        else "",
        f"{method.summary[0].upper()}{method.summary[1:]}: `{method.formula}` ({method.source}).",
        RECONSTRUCTION if report.method == "resm" else "",
        f"Base: `{base}`. Merged: {', '.join(f'`{name}`' for name in names)}.",
        f"## Recipe\n\n```yaml\n{yaml.safe_dump(recipe, sort_keys=False).rstrip()}\n```",
        f"## What was done\n\n| rule | tensors |\n|---|---|\n{rules}",
        f"{notes} clamps, fallbacks and warnings: see `resm_report.json`." if notes else "",
        f"Made with resm-kernels {__version__}. `resm verify` checks every byte of this folder "
        "against `resm_manifest.json`.",
    ]
    card = ModelCard("\n\n".join(section for section in sections if section) + "\n")
    return str(card).encode(errors="backslashreplace")
