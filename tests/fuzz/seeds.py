"""Seeds: small healthy and broken files of every kind."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

from resm_kernels.checkpoint.dtypes import DTYPES
from resm_kernels.checkpoint.files import seal
from resm_kernels.checkpoint.writer import lay_out_shards
import hashlib
from tests.hostile.files import entry, safetensors, torch_bytes, torch_zip, weights
from tests.test_layout import HOSTILE
from tests.test_recipe import GOOD, MISTAKES
import torch


def write_seeds(target: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, data in enumerate(seeds(target)):
        if len(data) < 8192:
            (folder / str(i)).write_bytes(data)


def seeds(target: str) -> list[bytes]:
    raw = [
        (h if isinstance(h, bytes) else json.dumps(h).encode(), d) for h, d, _ in HOSTILE.values()
    ]
    good = {
        "a": entry(),
        "b": entry(dtype="BF16", shape=[0], data_offsets=[16, 16]),
        "__metadata__": {"format": "pt", "t": "a"},
    }
    raw.append((json.dumps(good).encode(), bytes(16)))
    if target == "header":
        return [h for h, _ in raw]
    if target == "weights":
        return [safetensors(h, d) for h, d in raw]
    if target == "index":
        m = {
            "metadata": {"total_size": 16},
            "weight_map": {"a.weight": "a.safetensors", "b.weight": "b.safetensors"},
        }
        return [json.dumps(m).encode()] + [
            json.dumps({"weight_map": {"a": s}}).encode()
            for s in ("../x", "/etc/passwd", "..", 5, "model.safetensors.index.json", "x" * 300)
        ]
    if target == "config":
        c = {
            "model_type": "llama",
            "torch_dtype": "float32",
            "tie_word_embeddings": True,
            "vocab_size": 2,
            "text_config": {"vocab_size": 2, "dtype": "float32"},
            "auto_map": {"AutoModel": "m.M"},
            "quantization_config": {},
        }
        return [
            json.dumps(c).encode(),
            b'{"a": 1e99}',
            b'{"quantization_config": {"bits": 4}}',
            b'{"a": "\\ud800"}',
            b'{"a":' * 30 + b"1" + b"}" * 30,
        ]
    if target == "recipe":
        return [GOOD.encode(), *(m.encode() for m in MISTAKES)]
    bins = [
        torch_bytes({n: t[:2] for n, t in weights(0).items()}),
        torch_bytes({"p": torch.nn.Parameter(torch.ones(2, 2).T)}),
        torch_bytes([torch.ones(2)]),
        torch_bytes(torch.nn.Linear(2, 2).state_dict()),
        torch_bytes(
            {"b": torch.ones(2, dtype=torch.bfloat16), "i": torch.ones(3, dtype=torch.int8)}
        ),
    ]
    if target == "archive":
        return bins
    if target == "pickled":

        def inner(b: bytes) -> bytes:
            z = zipfile.ZipFile(io.BytesIO(b))
            return z.read(next(n for n in z.namelist() if n.endswith("data.pkl")))

        return [inner(b) for b in bins] + [b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R."]
    if target == "journal":
        (layout,) = lay_out_shards([("w", DTYPES["F32"], (2,))], 1 << 20)
        result = {
            "name": "w",
            "rule": "copy",
            "reason": None,
            "shape": [2],
            "ranks": [],
            "weights": [1.0],
        }
        line = {
            "shard": layout.name,
            "sha256": hashlib.sha256(layout.header + bytes(8)).hexdigest(),
            "digests": {"w": hashlib.sha256(bytes(8)).hexdigest()},
            "results": {"w": result},
        }
        return [
            json.dumps(line).encode() + b"\n",
            b"{}\n",
            b"[1]\n",
            json.dumps({**line, "shard": []}).encode(),
            json.dumps({**line, "digests": 3}).encode(),
        ]
    if target == "manifest":
        d = hashlib.sha256(bytes(8)).hexdigest()
        c = {
            "format": 1,
            "plan_id": "p",
            "files": {"w": {"size": 8, "sha256": d}},
            "tensors": {"t": {"file": "w", "range": [0, 8], "sha256": d}},
        }
        return [
            json.dumps(c).encode(),
            json.dumps({**c, "files": {"../x": {"size": 8}}}).encode(),
            json.dumps({**c, "tensors": []}).encode(),
        ]
    raise AssertionError(target)
