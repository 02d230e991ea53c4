"""One BLAS thread per test process, and Triton's interpreter where there is no GPU."""

import importlib.util
import os

import torch

# Several threads spinning on two cores are ten times slower.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
collect_ignore = (
    [] if importlib.util.find_spec("triton") else ["test_kernels.py", "test_gpu_kernels.py"]
)
