"""One BLAS thread per test process, and Triton's interpreter where there is no GPU."""

import importlib.util
import os
from collections.abc import Iterator

import pytest
import torch

from tests import fake_cusolver as fakes

# Several threads spinning on two cores are ten times slower.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
POSING = os.environ.get("RESM_TEST_DEVICE") == "posing"
if POSING:
    from tests import posing

    posing.install()
collect_ignore = [] if POSING else ["test_posing.py"]
if importlib.util.find_spec("triton") is None:
    collect_ignore += ["test_kernels.py", "test_gpu_kernels.py"]


@pytest.fixture(scope="session")
def built_fake(tmp_path_factory: pytest.TempPathFactory) -> fakes.Fake:
    if fakes.compiler() is None:
        pytest.skip("no C++ compiler: neither the extension nor the fake cuSOLVER can be built")
    return fakes.Fake(fakes.build(tmp_path_factory.mktemp("fake")))


@pytest.fixture
def fake_cusolver(built_fake: fakes.Fake, monkeypatch: pytest.MonkeyPatch) -> fakes.Fake:
    """cuSOLVER on host memory behind `resm_kernels.linalg.cusolver`."""
    built_fake.install(monkeypatch)
    return built_fake


if POSING:

    @pytest.fixture(autouse=True)
    def watched_streams() -> Iterator[None]:
        """On posing devices a test also fails where streams race."""
        with posing.no_races():
            yield
