"""The `resm` command."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import math
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from resm_kernels import __version__
from resm_kernels.errors import RecipeError, ResmError, UsageError, printable

if TYPE_CHECKING:
    from resm_kernels.engine.executor import Executor
    from resm_kernels.engine.plan import MergePlan
    from resm_kernels.engine.rates import Rates

INTERRUPTED = 130
NUMBERS = "numbers such as 0.5,0.8"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 when done, 1 when the work failed, 2 when it was asked wrongly."""
    options, words = build_parser().parse_known_args(arguments)
    if words and (not hasattr(options, "paths") or any(word.startswith("-") for word in words)):
        options.parser.error(f"unrecognized arguments: {' '.join(words)}")
    if words:  # argparse takes only those before the first option
        options.paths += words
    logging.basicConfig(
        level=logging.DEBUG if options.verbose else logging.INFO,
        format="%(message)s",
        stream=sys.stderr,
    )
    for noisy in ("httpx", "httpcore", "huggingface_hub", "filelock"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if sys.stdout is None:  # closed by who called
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status: int = options.run(options)
        sys.stdout.flush()
        return status
    except ResmError as error:
        print(f"resm: {printable(str(error))}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("resm: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (OSError, UnicodeError, MemoryError) as error:
        print(f"resm: {type(error).__name__}: {printable(str(error))}", file=sys.stderr)
        return 1
    except RuntimeError as error:  # what torch raises where memory runs out on the CPU
        from resm_kernels.methods import out_of_memory

        if not out_of_memory(error):
            raise
        print(f"resm: memory ran out: {printable(str(error))}", file=sys.stderr)
        return 1


def build_parser() -> argparse.ArgumentParser:
    """The command line; importing it loads neither torch nor rich."""
    parser = argparse.ArgumentParser(
        prog="resm",
        description="Merge fine-tuned checkpoints of one base model by singular-vector methods.",
    )
    parser.add_argument("--version", action="version", version=f"resm-kernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print the result as JSON on stdout")
    common.add_argument("-v", "--verbose", action="store_true", help="say more on stderr")

    merge = commands.add_parser(
        "merge",
        parents=[common],
        help="merge checkpoints",
        usage="resm merge RECIPE.yml OUT [options]\n"
        "       resm merge --base B --expert E --expert E [--method M] OUT [options]",
        description="Merge checkpoints by a recipe, or by --base, --expert and --method. OUT "
        "appears when it is complete; until then the work lies in OUT.partial.",
    )
    what = _merge_arguments(merge)
    what.add_argument("--method", metavar="NAME", help="see `resm methods` (default: resm)")
    what.add_argument("--lambda", metavar="X", dest="lambda_", type=float, help="merge coefficient")
    merge.set_defaults(run=_merge)

    sweep = commands.add_parser(
        "sweep",
        parents=[common],
        help="merge the same checkpoints several times, reading them once",
        usage="resm sweep RECIPE.yml OUT [--lambda X,Y,...] [--method M,N,...] [options]\n"
        "       resm sweep --base B --expert E --expert E --lambda X,Y,... OUT [options]",
        description="Merge by every method and lambda given, or as the recipe's `outputs` list. "
        "Each becomes a folder in OUT, with the bytes that `resm merge` writes.",
    )
    what = _merge_arguments(sweep)
    what.add_argument("--method", metavar="M,N", help="methods, one output each (default: resm)")
    what.add_argument("--lambda", metavar="X,Y", dest="lambda_", help="merge coefficients")
    sweep.set_defaults(run=_sweep)

    verify = commands.add_parser(
        "verify", parents=[common], help="check every byte of a merged checkpoint"
    )
    verify.add_argument("path", metavar="OUT")
    verify.set_defaults(run=_verify)

    report = commands.add_parser(
        "report", parents=[common], help="draw the HTML report of a merge anew"
    )
    report.add_argument("path", metavar="OUT")
    report.add_argument("-o", "--output", metavar="FILE", help="default: OUT/resm_report.html")
    report.set_defaults(run=_report)

    compare = commands.add_parser(
        "compare",
        parents=[common],
        help="how far two checkpoints lie apart",
        description="Compare two checkpoints tensor by tensor. Exit code 0 whether they are equal "
        "or not: --json says `equal`.",
    )
    compare.add_argument("a", metavar="A")
    compare.add_argument("b", metavar="B")
    compare.add_argument("--base", metavar="MODEL", help="their base: compare the changes to it")
    compare.add_argument("--html", metavar="FILE", help="also write a page")
    compare.set_defaults(run=_compare)

    inspect = commands.add_parser(
        "inspect",
        parents=[common],
        help="look at experts before merging them",
        description="What every expert changed in the base, and what looks wrong: another base, "
        "an unchanged or doubled expert, other vocabularies. Exit code 0 unless a model cannot be "
        "read.",
    )
    inspect.add_argument("base", metavar="BASE")
    inspect.add_argument(
        "--expert", metavar="MODEL", action="append", required=True, help="repeat for each"
    )
    inspect.add_argument(
        "--rank", action="store_true", help="factor too: ranks and overlap, as slow as a merge"
    )
    inspect.add_argument("--html", metavar="FILE", help="also write a page")
    inspect.set_defaults(run=_inspect)

    methods = commands.add_parser("methods", parents=[common], help="list methods and parameters")
    methods.set_defaults(run=_methods)

    doctor = commands.add_parser("doctor", parents=[common], help="what this machine has")
    doctor.add_argument(
        "--measure",
        action="store_true",
        help="measure how fast it reads, merges and writes (about 15 s on every core), and keep "
        "that in the cache folder: dry runs then predict times",
    )
    doctor.add_argument(
        "--folder",
        default=".",
        metavar="DIR",
        help="whose disk to measure, by a file of 256 MiB (default: the current folder)",
    )
    doctor.set_defaults(run=_doctor)

    demo = commands.add_parser(
        "demo", parents=[common], help="train a tiny base and three experts, merge, compare"
    )
    demo.add_argument("path", metavar="DIR")
    demo.add_argument("--seed", type=int, default=0)
    demo.set_defaults(run=_demo)
    for command in commands.choices.values():
        command.set_defaults(parser=command)
    return parser


def _merge_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """What `merge` and `sweep` share; returns the group that says what to merge."""
    parser.add_argument("paths", nargs="*", metavar="[RECIPE.yml] OUT")
    what = parser.add_argument_group("what to merge (instead of a recipe)")
    what.add_argument("--base", metavar="MODEL", help="folder, file, or Hub id org/name[@revision]")
    what.add_argument(
        "--expert",
        metavar="MODEL",
        action="append",
        default=[],
        help="a fine-tuned model of that base; repeat",
    )
    what.add_argument(
        "--weight",
        metavar="W",
        action="append",
        type=float,
        help="weight of an expert, in the order of --expert; repeat",
    )
    what.add_argument(
        "--param",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="a parameter of the method; repeat",
    )
    what.add_argument(
        "--out-dtype",
        metavar="DTYPE",
        help="bfloat16, float16, float32 or float64 (default: the base's)",
    )
    how = parser.add_argument_group("how to merge")
    how.add_argument(
        "--dry-run",
        action="store_true",
        help="print the plan, its memory, disk and time (see `resm doctor --measure`), write "
        "nothing",
    )
    how.add_argument("--resume", action="store_true", help="finish an interrupted merge")
    how.add_argument(
        "--device",
        default="cpu",
        help="cpu (default), cuda, cuda:N, cuda:N,cuda:M, all or auto; nothing has been measured "
        "on a GPU yet",
    )
    how.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="weights merged at a time on each device (default: one per core, two on a GPU)",
    )
    how.add_argument(
        "--threads",
        type=int,
        default=1,
        metavar="N",
        help="BLAS threads per worker; part of the plan (default: 1)",
    )
    how.add_argument(
        "--memory-budget",
        metavar="SIZE",
        help="most tensor bytes in memory, such as 8GB (default: 60%% of free)",
    )
    how.add_argument(
        "--gpu-memory",
        metavar="SIZE",
        help="most tensor bytes on each GPU (default: 85%% of free)",
    )
    how.add_argument(
        "--shard-size",
        metavar="SIZE",
        default="5GB",
        help="most bytes per output shard (default: 5GB)",
    )
    how.add_argument(
        "--nonfinite",
        choices=("error", "warn"),
        default="error",
        help="NaN or Inf in an input: stop, or keep the base's value there",
    )
    how.add_argument(
        "--allow-missing",
        action="store_true",
        help="copy a tensor from the base where an expert lacks it",
    )
    how.add_argument(
        "--allow-extra",
        action="store_true",
        help="leave out tensors of experts that the base lacks",
    )
    how.add_argument(
        "--only",
        metavar="PATTERN",
        action="append",
        default=[],
        help="merge just the tensors whose whole name matches, such as 'model.layers.40.*' "
        "(shell-style, as in exclude); the output is a part and no model; repeat",
    )
    how.add_argument(
        "--executor",
        choices=("local", "ray"),
        default="local",
        help="where to merge: this machine (default), or a Ray cluster that shares its files",
    )
    how.add_argument(
        "--ray-address",
        metavar="ADDRESS",
        help="of the cluster (default: that in RAY_ADDRESS, or the one on this machine)",
    )
    how.add_argument(
        "--ray-cpus",
        type=int,
        metavar="N",
        help="CPUs of each worker (default: a whole machine's, or its share for every GPU)",
    )
    how.add_argument("--no-report", action="store_true", help="do not write resm_report.html")
    how.add_argument("--quiet", action="store_true", help="no progress")
    return what


def _merge(options: argparse.Namespace) -> int:
    from resm_kernels import api
    from resm_kernels.report.tables import machine_dict, machine_facts, plan_table, report_table

    executor = _executor(options)
    what = _what(options, options.method, options.lambda_)
    made = api.plan(**what, **_how(options), executor=executor)
    if options.dry_run:
        with _rehearsal([made], options) as (space, rates):
            if options.json:
                _print_json({**made.to_dict(), **machine_dict([made], space, rates)})
            else:
                _print(plan_table(made, machine_facts([made], space, rates)))
        return 0
    report = api.execute(made, options.paths[-1], **_execution(options), executor=executor)
    if options.json:
        _print_json(report.to_dict())
    else:
        _print(report_table(report))
    return 0


def _sweep(options: argparse.Namespace) -> int:
    from resm_kernels import api
    from resm_kernels.report.tables import (
        machine_dict,
        machine_facts,
        plan_table,
        sweep_dict,
        sweep_facts,
        sweep_table,
    )

    methods = _listed("--method", options.method, "names such as resm,tsvm")
    lambdas = [*map(_number, _listed("--lambda", options.lambda_, NUMBERS))]
    executor = _executor(options)
    given = {**_what(options), **_how(options), "executor": executor}
    made = api.plan_sweep(methods=methods, lambdas=lambdas, **given)
    if options.dry_run:
        plans = [*made.values()]
        with _rehearsal(plans, options) as (space, rates):
            if options.json:
                outputs = {name: plan.to_dict() for name, plan in made.items()}
                needs = {**sweep_dict(plans), **machine_dict(plans, space, rates)}
                _print_json({"outputs": outputs, **needs})
            else:
                together = sweep_facts(plans, machine_facts(plans, space, rates))
                _print(*(plan_table(one, name=name) for name, one in made.items()), together)
        return 0
    given = {**_execution(options), "executor": executor}
    reports = api.execute_sweep(made, options.paths[-1], **given)
    if options.json:
        _print_json({name: report.to_dict() for name, report in reports.items()})
    else:
        _print(sweep_table(reports))
    return 0


def _executor(options: argparse.Namespace) -> Executor:
    """Where to merge."""
    from resm_kernels.engine.executor import LocalExecutor

    if options.executor == "local":
        if options.ray_address is not None or options.ray_cpus is not None:
            raise UsageError(
                "--ray-address and --ray-cpus belong to a cluster", fix="add --executor ray"
            )
        return LocalExecutor()
    from resm_kernels.engine.ray import RayExecutor

    return RayExecutor(options.ray_address or "auto", options.ray_cpus)


def _listed(flag: str, text: str | None, expected: str) -> list[str]:
    parts = [] if text is None else [part.strip() for part in text.split(",")]
    if not all(parts):
        raise UsageError(f"{flag}: got {text!r}", expected=expected)
    return parts


def _number(text: str) -> float:
    try:
        number = float(text if text.isascii() and "_" not in text else "")
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(f"--lambda: got {text!r}", expected=NUMBERS)
    return number


def _execution(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `api.execute`."""
    from rich.console import Console

    from resm_kernels.report.progress import BarProgress, LogProgress

    progress = None
    if not options.quiet:
        stderr = Console(stderr=True)
        progress = BarProgress(stderr) if stderr.is_terminal else LogProgress()
    return {"resume": options.resume, "no_report": options.no_report, "progress": progress}


def _how(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `api.plan` that say how to merge."""
    names = ("device", "workers", "threads", "memory_budget", "gpu_memory", "shard_size")
    more = ("nonfinite", "allow_missing", "allow_extra", "only")
    return {name: getattr(options, name) for name in (*names, *more)}


def _what(
    options: argparse.Namespace, method: str | None = None, lambda_: float | None = None
) -> dict[str, Any]:
    """The arguments of `api.plan` that say what to merge, by the method and lambda of `merge`."""
    from resm_kernels.recipe import parse_yaml

    inline = {
        "--base": options.base,
        "--expert": options.expert,
        "--weight": options.weight,
        "--method": method,
        "--lambda": lambda_,
        "--param": options.param,
        "--out-dtype": options.out_dtype,
    }
    given = [name for name, value in inline.items() if value not in (None, [])]
    if len(options.paths) == 2:
        if given:
            raise UsageError(
                f"{options.command}: {', '.join(given)} beside a recipe",
                fix="write it into the recipe, or leave the recipe out",
            )
        return {"recipe": options.paths[0]}
    if len(options.paths) != 1 or not options.base or not options.expert:
        raise UsageError(
            f"{options.command}: expected RECIPE.yml OUT, or --base, --expert and OUT",
            got=" ".join(options.paths) or "no output folder",
            fix=f"see resm {options.command} --help",
        )
    parameters: dict[str, Any] = {}
    for text in options.param:
        name, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"--param: got {text!r}", expected="NAME=VALUE")
        try:
            parameters[name] = parse_yaml(value, text)
        except RecipeError as error:
            reason = "; ".join(error.mistakes)
            raise UsageError(f"--param {name}: not a value: {value!r}", got=reason) from error
    if lambda_ is not None:
        parameters["lambda"] = lambda_
    return {
        "base": options.base,
        "experts": options.expert,
        **({"method": method} if method else {}),
        "weights": options.weight,
        "parameters": parameters,
        "out_dtype": options.out_dtype,
    }


@contextlib.contextmanager
def _rehearsal(
    plans: Sequence[MergePlan], options: argparse.Namespace
) -> Iterator[tuple[tuple[int, int], Rates | None]]:
    """What a dry run prints besides plans: disk space and rates.

    It refuses what the merge itself would refuse, a full disk only after printing.
    """
    from pathlib import Path

    from resm_kernels.checkpoint.journal import absolute, check_output
    from resm_kernels.engine.plan import check_disk, disk_space
    from resm_kernels.engine.rates import load_rates

    output = absolute(Path(options.paths[-1]))
    folders = [folder for plan in plans for folder in plan.input_folders]
    several = options.command == "sweep"
    resume = several or options.resume  # each output of a sweep has a .partial of its own
    check_output(output, folders, resume=resume, several=several and options.resume)
    layouts = [layout for plan in plans for layout in plan.layouts]
    here = options.executor == "local"
    yield disk_space(layouts, output), load_rates() if here else None
    sys.stdout.flush()
    check_disk([] if options.resume else layouts, output)


def _verify(options: argparse.Namespace) -> int:
    from dataclasses import asdict

    from resm_kernels import api

    found = api.verify(options.path)
    if options.json:
        _print_json(asdict(found))
        return 0
    held = f"{found.tensors} tensors"
    if found.part_of is not None:
        held = f"part of a merge ({found.tensors} of {found.part_of} tensors)"
    print(
        f"{found.path}: {found.files} files, {held}, {found.total_bytes:,} bytes: "
        "every byte as it was written"
    )
    if found.unlisted:
        print(f"not part of the merge: {', '.join(found.unlisted)}")
    return 0


def _report(options: argparse.Namespace) -> int:
    from resm_kernels import api

    written = str(api.draw_report(options.path, options.output))
    if options.json:
        _print_json({"path": written})
    else:
        print(written)
    return 0


def _compare(options: argparse.Namespace) -> int:
    from resm_kernels import api
    from resm_kernels.report.checks import comparison_page, comparison_table

    found = api.compare(options.a, options.b, options.base)
    if options.html:
        _write_page(options.html, comparison_page(found))
    if options.json:
        _print_json(found.to_dict())
    else:
        _print(comparison_table(found))
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from resm_kernels import api
    from resm_kernels.report.checks import inspection_page, inspection_table

    found = api.inspect(options.base, options.expert, rank=options.rank)
    if options.html:
        _write_page(options.html, inspection_page(found))
    if options.json:
        _print_json(found.to_dict())
    else:
        _print(inspection_table(found))
    return 0


def _write_page(path: str, page: str) -> None:
    from pathlib import Path

    from resm_kernels.checkpoint.files import seal_text, write_file

    write_file(Path(path), seal_text(page))


def _methods(options: argparse.Namespace) -> int:
    from resm_kernels.methods import METHODS
    from resm_kernels.report.tables import methods_table, methods_to_dict

    if options.json:
        _print_json(methods_to_dict(METHODS.values()))
    else:
        _print(methods_table(METHODS.values()))
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from resm_kernels.doctor import diagnose
    from resm_kernels.report.tables import doctor_table

    if options.measure:
        from pathlib import Path

        from resm_kernels.engine.rates import measure_rates, save_rates

        save_rates(measure_rates(Path(options.folder)))
    found = diagnose()
    if options.json:
        _print_json(found)
    else:
        _print(doctor_table(found))
    return 0


def _print(*what: object) -> None:
    """On a terminal as wide as that; into a file or a pipe nothing is cut."""
    from rich.console import Console

    fitted = sys.stdout.isatty() or "COLUMNS" in os.environ
    Console(width=None if fitted else 1000).print(*what, sep="\n")


def _demo(options: argparse.Namespace) -> int:
    from rich.console import Console

    from resm_kernels import demo

    results = demo.run(options.path, seed=options.seed, console=Console(stderr=options.json))
    if options.json:
        _print_json(results)
    return 0


def _print_json(content: object) -> None:
    print(json.dumps(content, ensure_ascii=False))  # indented, 42,000 tensors take seconds more
