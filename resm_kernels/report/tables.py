"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from resm_kernels.engine.forecast import forecast
from resm_kernels.engine.plan import MergePlan, plan_steps, predicted_peak
from resm_kernels.engine.rates import Rates
from resm_kernels.engine.result import MergeReport
from resm_kernels.methods import Method
from resm_kernels.report.page import seconds

SHOWN_NOTES = 8


def plan_table(
    plan: MergePlan, facts: Mapping[str, str] | None = None, name: str = "plan"
) -> RenderableType:
    """What a merge will do and cost, by rule; `facts` join the plan's own."""
    title = f"{name} {plan.plan_id[:12]}: {plan.recipe.method}"
    by_rule = Table(title=Text(title), title_justify="left")
    for heading in ("rule", "why", "tensors", "read", "written"):
        by_rule.add_column(heading, justify="left" if heading in ("rule", "why") else "right")
    groups: dict[tuple[str, str], list[int]] = {}
    for tensor in plan.tensors:
        why = tensor.reason or (f"as {tensor.split.label}" if tensor.split else "")
        row = groups.setdefault((tensor.rule, why), [0, 0, 0])
        row[0] += 1
        row[1] += tensor.read_bytes
        row[2] += tensor.write_bytes
    for (rule, reason), (count, read, written) in groups.items():
        by_rule.add_row(rule, Text(reason), str(count), size(read), size(written))
    totals = _facts(
        {
            **({"part": f"{plan.part.tensors} of {plan.part.of} tensors"} if plan.part else {}),
            "read": size(plan.read_bytes),
            "written": f"{size(plan.write_bytes)} in {len(plan.layouts)} shards",
            "peak memory": f"{size(plan.peak_memory)} beside the interpreter "
            f"(budget {size(plan.memory_budget)})",
            **_device_facts(plan),
            "runs on": f"{_devices(plan)}; {plan.workers} workers "
            f"{'each ' * (len(plan.devices) > 1)}x {plan.options.threads} threads",
            **(facts or {}),
        }
    )
    return Group(by_rule, totals, *_left_out(plan.left_out))


def _devices(plan: MergePlan) -> str:
    return ", ".join(map(str, plan.devices))


def _device_facts(plan: MergePlan) -> dict[str, str]:
    if not plan.has_devices:
        return {}
    planned, budget = size(plan.peak_device_memory), size(plan.device_memory)
    return {"GPU memory": f"{planned} on each device (budget {budget})"}


def machine_facts(
    plans: Sequence[MergePlan], space: tuple[int, int], rates: Rates | None
) -> dict[str, str]:
    """What merges need of this machine: disk (needed, free) and time, where it is known."""
    needed, free = space
    facts = {"disk": f"{size(needed)} needed, {size(free)} free"}
    expected = None if rates is None else forecast(plans, rates)
    if rates is None:
        facts["time"] = "unknown: `resm doctor --measure` measures this machine, once"
    elif expected is None:
        facts["time"] = f"unknown on {_devices(plans[0])}: only the CPU's rates are measured"
    else:
        stages = {name: value for name, value in asdict(expected).items() if name != "wall"}
        each = ", ".join(f"{name} {seconds(value)}" for name, value in stages.items())
        facts["time"] = f"about {seconds(expected.wall)} (at rates of {rates.day})"
        facts["busy"] = f"{each}: stages overlap"
    return facts


def machine_dict(
    plans: Sequence[MergePlan], space: tuple[int, int], rates: Rates | None
) -> dict[str, Any]:
    """The same as plain data, for `--dry-run --json`."""
    expected = None if rates is None else forecast(plans, rates)
    return {
        "disk_bytes": space[0],
        "free_disk_bytes": space[1],
        "predicted_seconds": expected and asdict(expected),
    }


def sweep_dict(plans: Sequence[MergePlan]) -> dict[str, int]:
    """What several merges cost together, since they read their inputs once."""
    steps = plan_steps(plans)
    return {
        "read_bytes": sum(step.read_bytes for step in steps),
        "write_bytes": sum(plan.write_bytes for plan in plans),
        "peak_memory_bytes": predicted_peak(steps, plans[0]),
    }


def sweep_facts(
    plans: Sequence[MergePlan], facts: Mapping[str, str] | None = None
) -> RenderableType:
    """The same for people."""
    found = sweep_dict(plans)
    return _facts(
        {
            "together": f"{len(plans)} outputs",
            "read": size(found["read_bytes"]),
            "written": size(found["write_bytes"]),
            "peak memory": size(found["peak_memory_bytes"]),
            **(facts or {}),
        }
    )


def report_table(report: MergeReport) -> RenderableType:
    """What a merge did."""
    rules = ", ".join(f"{count} {rule}" for rule, count in sorted(report.rules.items()))
    moved = (report.read_bytes + report.written_bytes) / max(report.seconds, 1e-9)
    facts = {
        "output": report.output,
        "tensors": f"{len(report.tensors)} ({rules})",
        "time": f"{report.seconds:.1f} s ({size(int(moved))}/s read and written)",
        "peak memory": f"{size(report.peak_memory)} (planned {size(report.predicted_memory)})",
    }
    if report.part:
        facts["part"] = f"of {report.part['of']} tensors: no whole model"
    planned = size(report.predicted_device_memory)
    for name, peak in report.peak_device_memory.items():
        facts[f"peak on {name}"] = f"{size(peak)} (planned {planned})"
    if report.cluster:
        facts["cluster"] = ", ".join(
            f"{worker['name']}: {worker['shards']} shards{' (lost)' * worker['lost']}"
            for worker in report.cluster["workers"][:SHOWN_NOTES]
        )
    if report.kept_shards:
        facts["resumed"] = f"{report.kept_shards} shards were finished before"
    notes = [f"{name}: {note}" for name, found in report.all_notes.items() for note in found]
    lines = [Text(line, style="yellow") for line in notes[:SHOWN_NOTES]]
    if len(notes) > SHOWN_NOTES:
        lines.append(Text(f"and {len(notes) - SHOWN_NOTES} more notes: see resm_report.json"))
    return Group(_facts(facts), *lines, *_left_out(report.left_out))


def sweep_table(reports: Mapping[str, MergeReport]) -> RenderableType:
    """What a sweep did: a line for each output."""
    table = Table()
    for heading in ("output", "method", "tensors", "written", "notes"):
        number = heading in ("tensors", "written")
        table.add_column(heading, justify="right" if number else "left", overflow="fold")
    for report in reports.values():
        notes = sum(len(found) for found in report.all_notes.values())
        table.add_row(
            Text(report.output),
            report.method,
            str(len(report.tensors)),
            size(report.written_bytes) if report.written_bytes else "before",
            str(notes or ""),
        )
    longest = max(reports.values(), key=lambda report: report.seconds)
    facts = {
        "read": size(longest.read_bytes),
        "time": f"{longest.seconds:.1f} s",
        "peak memory": f"{size(longest.peak_memory)} (planned {size(longest.predicted_memory)})",
    }
    return Group(table, _facts(facts))


def methods_table(methods: Iterable[Method[Any]]) -> RenderableType:
    """Methods with formula, source and parameters."""
    parts: list[RenderableType] = []
    for method in methods:
        parts += [
            Text.assemble((method.name, "bold"), f"  {method.summary}"),
            Text(f"  {method.formula}\n  {method.source}", style="dim"),
        ]
        table = Table(box=None, show_header=False, padding=(0, 2))
        for spec in method.specs.values():
            text = f"{spec.help} (per model)" if spec.per_model else spec.help
            table.add_row(f"  {spec.name}", Text(_default(spec.default)), Text(text))
        parts += [table, Text()]
    return Group(*parts)


def methods_to_dict(methods: Iterable[Method[Any]]) -> dict[str, Any]:
    """The same as plain data."""
    return {
        method.name: {
            "summary": method.summary,
            "formula": method.formula,
            "source": method.source,
            "parameters": {
                s.name: {
                    "default": s.default,
                    "choices": s.choices,
                    "per_model": s.per_model,
                    "help": s.help,
                }
                for s in method.specs.values()
            },
        }
        for method in methods
    }


def doctor_table(found: Mapping[str, Any]) -> RenderableType:
    """What `diagnose` found."""
    packages = {name: version or "not installed" for name, version in found["packages"].items()}
    devices = [
        f"{d['name']} ({size(d['memory_bytes'])}, compute capability {d['capability']})"
        for d in found["cuda_devices"]
    ]
    solvers: dict[str, list[str]] = {}
    for name, state in found["cusolver"]["solvers"].items():
        solvers.setdefault(state, []).append(name)
    return _facts(
        {
            "resm-kernels": found["resm_kernels"],
            "python": f"{found['python']} on {found['platform']}",
            **packages,
            "cores": str(found["cores"]),
            "memory": f"{size(found['available_memory_bytes'])} available",
            "GPUs": "; ".join(devices) or "none",
            "cuSOLVER": found["cusolver"]["libraries"].get(
                "cusolver", "none; torch.linalg instead"
            ),
            "cuSOLVER's solvers": "; ".join(
                f"{', '.join(names)}: {state}" for state, names in solvers.items()
            ),
            "rates": _rates(found["rates"]),
            **{f"{part}": place for part, place in found["runs_on"].items()},
        }
    )


def _rates(rates: Mapping[str, Any] | None) -> str:
    if rates is None:
        return "not measured: --measure does, for the times of a dry run"
    stages = ", ".join(
        f"{stage} {size(round(1 / rates[stage]['wall']))}/s" for stage in ("read", "write")
    )
    work = f"float64 products {rates['work']['gemm_fp64'] / 1e9:.3g} GFLOP/s a worker"
    return f"{stages}, {work} ({rates['day']})"


def size(count: int) -> str:
    """Bytes for people: 1.23 GB."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def _facts(facts: Mapping[str, str]) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(Text(name, style="bold"), Text(value))
    return table


def _left_out(left_out: Mapping[str, str]) -> list[RenderableType]:
    return [Text(f"left out: {name} ({reason})") for name, reason in left_out.items()]


def _default(value: object) -> str:
    return " ".join(value) if isinstance(value, tuple) else str(value).lower()
