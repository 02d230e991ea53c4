"""`.bin` files are read by offset: the numbers that torch would load, and never through a map."""

from __future__ import annotations

import io
import os
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import resm_kernels
from resm_kernels.checkpoint import reader, torch_file
from resm_kernels.checkpoint.hub import ModelReference
from resm_kernels.checkpoint.layout import Checkpoint
from resm_kernels.checkpoint.reader import open_checkpoint, read_tensor
from resm_kernels.checkpoint.torch_file import MAX_PICKLE
from resm_kernels.errors import CheckpointError
from tests.checkpoints import fine_tuned, save
from tests.faults import in_child

BIG = torch.arange(6 * 50 * 70).reshape(6, 50, 70).float()
VIEWS = {
    "row-major": BIG,
    "transposed": BIG.transpose(0, 2),
    "slice": BIG[1:5, 3::7, 2:60],
    "column": BIG[:, :, 3],
    "expanded": BIG[0, :1].expand(30, 70),
    "overlapping": BIG.view(-1).as_strided((40, 9), (3, 2), 5),
    "empty": BIG[:, :0],
    "scalar": BIG[3, 4, 5],
    "parameter": torch.nn.Parameter(BIG[2]),
    "half": BIG.bfloat16().mT,
    "integers": torch.arange(9)[::2],
}


def written(folder: Path, content: object) -> Path:
    folder.mkdir(exist_ok=True)
    torch.save(content, folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


def opened(folder: Path) -> Checkpoint:
    return open_checkpoint(ModelReference(str(folder)))


@pytest.mark.parametrize("piece", [64, 4096, 1 << 20])
def test_every_view_is_what_torch_loads(
    piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "PIECE", piece)
    expected = torch.load(written(tmp_path, VIEWS), weights_only=True)
    checkpoint = opened(tmp_path)
    assert checkpoint.tensors.keys() == expected.keys()
    for name, info in checkpoint.tensors.items():
        found = read_tensor(checkpoint.files[0], info)
        assert (found.dtype, found.shape) == (expected[name].dtype, expected[name].shape)
        assert found.is_contiguous()
        assert torch.equal(found, expected[name])


def test_a_small_view_of_a_large_storage_reads_little(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path, {"w": torch.zeros(1 << 22)[:: 1 << 16]})
    read = 0
    original = os.preadv

    def counted(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        nonlocal read
        read += len(buffers[0])
        return original(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", counted)
    monkeypatch.setattr(reader, "PIECE", 4096)
    checkpoint = opened(tmp_path)
    assert read_tensor(checkpoint.files[0], checkpoint.tensors["w"]).shape == (64,)
    assert read == 64 * 4


def _merge_truncated(base: Path, expert: Path, output: Path) -> None:
    """Truncate the expert between the check of its stamp and the reading, every time."""
    check = reader.check_stamp

    def check_and_truncate(file: reader.WeightFile, status: os.stat_result) -> None:
        check(file, status)
        if file.path.suffix == ".bin":
            os.truncate(file.path, 4096)

    reader.check_stamp = check_and_truncate
    try:
        resm_kernels.merge(base, [expert], output, workers=1)
    except CheckpointError as error:
        told = "pytorch_model.bin: tensor 'w': the file ended early" in str(error)
        os._exit(42 if told else 1)


def test_a_bin_truncated_during_the_merge_is_an_error_not_a_sigbus(tmp_path: Path) -> None:
    state = {"w": torch.randn(64, 64)}
    base = save(tmp_path / "base", state)
    expert = written(tmp_path / "expert", fine_tuned(state, 1)).parent
    assert in_child(_merge_truncated, base, expert, tmp_path / "out") == 42
    assert not list(tmp_path.glob("out*"))


def rewritten(change: Callable[[str, bytes], bytes | None], **options: int) -> bytes:
    """A small state dict in a zip file whose records were changed or dropped."""
    source = io.BytesIO()
    torch.save({"w": torch.ones(4, 4), "v": torch.ones(3)}, source)
    target = io.BytesIO()
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", **options) as new:
        for name in old.namelist():
            content = change(name.partition("/")[2], old.read(name))
            if content is not None:
                new.writestr(name, content)
    return target.getvalue()


def replaced(record: str, content: bytes | None) -> bytes:
    return rewritten(lambda name, old: content if name == record else old)


def appended(record: str) -> bytes:
    file = io.BytesIO(rewritten(lambda _, old: old))
    with zipfile.ZipFile(file, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        archive.writestr(archive.namelist()[0].partition("/")[0] + record, b"")
    return file.getvalue()


BROKEN = {
    "compressed": (rewritten(lambda _, old: old, compression=zipfile.ZIP_DEFLATED), "compressed"),
    "short storage": (replaced("data/0", b"x"), "tensor 'w': its storage has 1 bytes"),
    "no storage": (replaced("data/1", None), "tensor 'v': no dtype, or no data"),
    "no pickle": (replaced("data.pkl", None), "no data.pkl"),
    "long pickle": (replaced("data.pkl", bytes(MAX_PICKLE + 1)), f"longer than {MAX_PICKLE} bytes"),
    "big-endian": (replaced("byteorder", b"big"), "byte order b'big'"),
    "a record twice": (appended("/data.pkl"), "stands twice"),
}


def test_an_archive_of_another_writer_is_read(tmp_path: Path) -> None:
    """The broken ones below are made in the same way."""
    (tmp_path / "pytorch_model.bin").write_bytes(rewritten(lambda _, old: old))
    assert opened(tmp_path).tensors.keys() == {"w", "v"}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_archive_is_one_error(case: str, tmp_path: Path) -> None:
    content, message = BROKEN[case]
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        opened(tmp_path)
    assert "pytorch_model.bin" in str(caught.value)


def test_a_directory_longer_than_any_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_file, "MAX_PICKLE", 100)
    written(tmp_path, {"w": torch.ones(4)})
    with pytest.raises(CheckpointError, match="a zip directory of"):
        opened(tmp_path)


def test_a_view_past_its_storage_is_refused(tmp_path: Path) -> None:
    """Sixteen rows where the pickle of four was."""
    path = written(tmp_path, {"w": torch.ones(4, 4)})
    names = ("/data.pkl", b"K\x00K\x04K\x04\x86", b"K\x00K\x10K\x04\x86")
    with zipfile.ZipFile(path) as archive:
        pickled = archive.read(archive.namelist()[0].partition("/")[0] + names[0])
    assert pickled.count(names[1]) == 1
    path.write_bytes(rewritten(lambda name, old: old))
    changed = rewritten(
        lambda name, old: old.replace(names[1], names[2]) if name == "data.pkl" else old
    )
    path.write_bytes(changed)
    with pytest.raises(CheckpointError, match=r"tensor 'w': 256 bytes in a storage of 64"):
        opened(tmp_path)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:TypedStorage is depr")
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.quint8),
        lambda: torch.eye(4).to_sparse(),
        lambda: torch.ones(4, dtype=torch.complex64).conj().imag,
    ],
    ids=["quantised", "sparse", "negated"],
)
def test_what_is_no_plain_tensor_is_refused(
    make: Callable[[], torch.Tensor], tmp_path: Path
) -> None:
    """The bytes of a negated view are not its values either."""
    written(tmp_path, {"w": make()})
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: "):
        opened(tmp_path)
