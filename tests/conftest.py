"""One BLAS thread per test process: several spinning on two cores are ten times slower."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
