"""How long a merge will take, from its plan and from rates that were measured on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from resm_kernels.checkpoint.writer import CHECK
from resm_kernels.engine.flow import READERS
from resm_kernels.engine.plan import MergePlan, plan_steps
from resm_kernels.engine.rates import Rates


@dataclass(frozen=True)
class Forecast:
    """Predicted seconds of a merge.

    Attributes
    ----------
    read, compute, write, finish : float
        Busy time of the stages, over all their threads, as a report has it. `write` includes the
        digests, `finish` the syncing and the reading back.
    wall : float
        From the first byte to the last: the busiest of the stages and of the processor, and what
        nothing can overlap.
    """

    read: float
    compute: float
    write: float
    finish: float
    wall: float


def forecast(plans: Sequence[MergePlan], rates: Rates) -> Forecast | None:
    """Predict the time of one merge, or of several that read their inputs once.

    Parameters
    ----------
    plans : sequence of MergePlan
        As `plan_steps` takes them.
    rates : Rates
        Measured with every core busy and one BLAS thread in each worker; other numbers of workers
        and threads are predicted with the same rates.

    Returns
    -------
    Forecast or None
        None where merging happens on another device than was measured.

    Notes
    -----
    Spectral methods take their operations over the rate of each kind, at the highest rank; outputs
    of one pass that need the same operations share them. All other methods take their entries over
    the method's own rate.
    """
    if any(plan.device.type != "cpu" for plan in plans):
        return None
    steps = plan_steps(plans)
    shards = [layout.size for plan in plans for layout in plan.layouts]
    read_bytes, write_bytes = sum(step.read_bytes for step in steps), sum(shards)
    each = [step.seconds(rates.work, rates.entries) for step in steps]
    workers, compute = plans[0].workers, sum(each)
    overhead = rates.tensor_seconds * len(steps) * len(plans)
    moved = ((rates.read, read_bytes), (rates.write, write_bytes), (rates.finish, write_bytes))
    read, write, finish = (count * pace.wall for pace, count in moved)
    cpu = compute + overhead + sum(count * pace.cpu for pace, count in moved)
    busiest = max(
        read / READERS,
        compute / min(workers, rates.cores),
        max(each),
        write,
        finish,
        overhead,
        cpu / rates.cores,
    )
    ends = steps[0].read_bytes * rates.read.wall + min(shards[-1], CHECK) * rates.finish.wall
    return Forecast(read, compute, write, finish, busiest + ends)
