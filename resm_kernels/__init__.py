"""resm-kernels: merge fine-tuned checkpoints with SVD-family methods, RESM first."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from resm_kernels.api import (
        compare as compare,
    )
    from resm_kernels.api import (
        draw_report as draw_report,
    )
    from resm_kernels.api import (
        inspect as inspect,
    )
    from resm_kernels.api import (
        merge as merge,
    )
    from resm_kernels.api import (
        merge_state_dicts as merge_state_dicts,
    )
    from resm_kernels.api import (
        merge_tensors as merge_tensors,
    )
    from resm_kernels.api import (
        plan as plan,
    )
    from resm_kernels.api import (
        sweep as sweep,
    )
    from resm_kernels.api import (
        verify as verify,
    )
    from resm_kernels.engine.ray import RayExecutor as RayExecutor

__all__ = [
    "RayExecutor",
    "__version__",
    "compare",
    "draw_report",
    "inspect",
    "merge",
    "merge_state_dicts",
    "merge_tensors",
    "plan",
    "sweep",
    "verify",
]


if not TYPE_CHECKING:  # else type checkers would take a name that is not there for any other

    def __getattr__(name: str) -> Any:
        """Import the API on first use, so that `import resm_kernels` does not import torch."""
        if name in __all__:
            room = "resm_kernels.engine.ray" if name == "RayExecutor" else "resm_kernels.api"
            return getattr(importlib.import_module(room), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
