"""What the scores say: means over seeds, distances to the Pareto front, paired differences."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, stdev

from benchmarks.record import Row

SETTING = ("size", "tuning", "experts")
FAMILY = ("size", "seed")
TSVM = "all off (TSV-M)"


def distance(point: Mapping[str, float], others: Iterable[Mapping[str, float]]) -> float:
    """How far a point lies behind the Pareto front of `others`.

    The most that another merge is better by on every skill at once, in units of the experts' own
    scores (the additive epsilon indicator); 0 on the front.
    """
    behind = (min(other[skill] - score for skill, score in point.items()) for other in others)
    return max((0.0, *behind))


def merges(rows: Iterable[Row]) -> list[Row]:
    """One row per case and model: mean, worst skill, mean loss, distance to the methods' front."""
    found: list[Row] = []
    for key, case in grouped(rows, (*SETTING, "seed")):
        models = grouped(case, ("group", "model"))
        points = {
            name: {row["skill"]: float(row["normalised"]) for row in scores}
            for name, scores in models
        }
        front = [point for (group, _), point in points.items() if group == "method"]
        for (group, model), scores in models:
            point = points[group, model]
            found.append(
                {
                    **dict(zip((*SETTING, "seed"), key, strict=True)),
                    "group": group,
                    "model": model,
                    "lambda": scores[0]["lambda"],
                    "mean": fmean(point.values()),
                    "worst": min(point.values()),
                    "distance": distance(point, front),
                    "loss": fmean(float(row["answer_loss"]) for row in scores),
                }
            )
    return found


def summary(rows: Iterable[Row]) -> list[Row]:
    """One row per setting and model: the mean and the standard deviation over seeds."""
    found: list[Row] = []
    for key, group in grouped(rows, (*SETTING, "group", "model")):
        row: Row = dict(zip((*SETTING, "group", "model"), key, strict=True))
        row["lambda"] = " ".join(str(case["lambda"]) for case in group)
        row["seeds"] = len(group)
        for measure in ("mean", "worst", "distance", "loss"):
            values = [case[measure] for case in group]
            row[measure] = round(fmean(values), 3)
            row[f"{measure}_sd"] = round(stdev(values), 3) if len(values) > 1 else ""
        found.append(row)
    return found


def against(rows: Sequence[Row], model: str, group: str) -> list[Row]:
    """Paired differences of every model of a group to one of them.

    Cases that share a base are not independent: they are averaged first, and the standard error is
    that of the families' means.
    """
    found = []
    of_group = [row for row in rows if row["group"] == group]
    peers = {_case(row): row for row in of_group if row["model"] == model}
    for (name,), own in grouped(of_group, ("model",)):
        row: Row = {"model": name, "against": model, "cases": len(own)}
        for measure in ("mean", "worst"):
            families = [
                fmean(case[measure] - peers[_case(case)][measure] for case in family)
                for _, family in grouped(own, FAMILY)
            ]
            row[measure] = round(fmean(families), 4)
            row[f"{measure}_se"] = round(_standard_error(families), 4)
        row["better"] = sum(case["mean"] > peers[_case(case)]["mean"] + 0.005 for case in own)
        row["worse"] = sum(case["mean"] < peers[_case(case)]["mean"] - 0.005 for case in own)
        found.append(row)
    return found


def _standard_error(values: Sequence[float]) -> float:
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def _case(row: Row) -> tuple[str, ...]:
    return tuple(str(row[column]) for column in (*SETTING, "seed"))


def grouped(rows: Iterable[Row], columns: Sequence[str]) -> list[tuple[tuple[str, ...], list[Row]]]:
    """Rows by the values of columns, in the order in which these appear first."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(str(row[column]) for column in columns), []).append(row)
    return list(found.items())
