"""From a model reference to a folder: a local path, or a repository on the Hugging Face Hub."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from resm_kernels.errors import CheckpointError

REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
WEIGHTS = (
    ("model*.safetensors", "model.safetensors.index.json"),
    ("*.safetensors", "*.safetensors.index.json"),
    ("pytorch_model*.bin", "pytorch_model.bin.index.json"),
)
"""What is fetched, in order of preference, until something is there."""
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
"""What a LoRA adapter holds; fetched where there is no whole model, or an adapter is asked for."""
NAME_ITS_BASE = "name its base as base_model to use it as an expert, or merge it with PEFT first"
"""What to do with an adapter where a whole model has to stand."""
LONGEST = 8192
"""Most characters of `base+adapter`: two paths have no more."""
COMPANIONS = (
    "*.json",
    "*.jinja",
    "*.model",
    "*.txt",
    "*.tiktoken",
    "*.py",
    "chat_template*",
)


@dataclass(frozen=True)
class ModelReference:
    """`path_or_repo[@revision]`, as recipes write it; an expert may be `base+adapter`."""

    text: str

    @property
    def path(self) -> Path:
        """The reference read as a local path."""
        return Path(os.path.expanduser(self.text))

    def exists(self) -> bool:
        """Whether there is such a local path; a name that no file can have is none."""
        try:
            return os.path.lexists(self.path)
        except ValueError:
            return False

    def same_as(self, other: ModelReference) -> bool:
        """Whether both name one model: equal texts, or paths to one place."""
        both_local = self.exists() and other.exists()
        return self.text == other.text or (
            both_local and os.path.realpath(self.path) == os.path.realpath(other.path)
        )

    @property
    def with_adapter(self) -> tuple[ModelReference, ModelReference] | None:
        """(base, adapter) where the text is `base+adapter`, else None.

        A path that exists is never split. Of several plus signs the one counts that leaves an
        existing path or a Hub id on either side, if there is one only.
        """
        if "+" not in self.text or len(self.text) > LONGEST or self.exists():
            return None
        splits = [
            (ModelReference(self.text[:i].strip()), ModelReference(self.text[i + 1 :].strip()))
            for i, letter in enumerate(self.text)
            if letter == "+"
        ]
        if len(splits) > 1:
            splits = [s for s in splits if all(part.exists() or part.repo for part in s)]
        return splits[0] if len(splits) == 1 and all(part.text for part in splits[0]) else None

    @property
    def repo(self) -> tuple[str, str | None] | None:
        """The reference read as (repository id, revision), or None where it cannot be one."""
        name, _, revision = self.text.partition("@")
        return (name, revision or None) if REPO_ID.fullmatch(name) else None

    def __str__(self) -> str:
        return self.text


def locate(reference: ModelReference, *, adapter: bool = False) -> Path:
    """Return the local folder (or single weight file) of a model or of a LoRA adapter.

    A path that exists is taken as it is; anything else of the form `org/name[@revision]` is
    fetched through `huggingface_hub` (its cache, token and offline mode hold), weights and
    configuration only, code never run. Of a repository that holds both a whole model and an
    adapter, the adapter comes only where `adapter` asks for it.

    Raises
    ------
    CheckpointError
        Where there is neither a path nor a repository, or the Hub refuses or cannot be reached.
    """
    if reference.exists():
        return reference.path
    if reference.with_adapter:
        raise CheckpointError(
            f"{reference}: no such path, and LoRA adapters (base+adapter) cannot stand here",
            expected="a whole model",
            fix=NAME_ITS_BASE,
        )
    if reference.repo is None:
        raise CheckpointError(
            f"{reference}: no such file or folder",
            expected="a checkpoint folder, a .safetensors file, or a Hub id org/name[@revision]",
        )
    return _download(*reference.repo, adapter)


def _download(repo: str, revision: str | None, adapter: bool) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    def fetch(weights: tuple[str, ...]) -> tuple[Path, bool]:
        """The folder, and whether weights of this kind are there."""
        left_out = [] if weights[0] in ADAPTER_WEIGHTS else list(ADAPTER_WEIGHTS)
        folder = Path(
            huggingface_hub.snapshot_download(
                repo,
                revision=revision,
                allow_patterns=[*weights, *COMPANIONS],
                ignore_patterns=["*/*", *left_out],
            )
        )
        names = {found.name for pattern in weights for found in folder.glob(pattern)}
        return folder, bool(names.difference(left_out))

    where = repo if revision is None else f"{repo}@{revision}"
    fix = "check the spelling; a local checkpoint is named by its path"
    try:
        for weights in (*(() if adapter else WEIGHTS), *((name,) for name in ADAPTER_WEIGHTS)):
            folder, there = fetch(weights)
            if there:
                break
        return folder
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{where}: access is gated", fix="accept its terms on the Hub, then `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{where}: no such revision", fix=fix) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{where}: no such folder here, no such model on the Hub", fix=fix
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise CheckpointError(
            f"{where}: no such folder here, not in the Hub's cache, and the Hub is out of reach",
            fix=f"{fix}; or download it where there is a network",
        ) from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise CheckpointError(f"{where}: the Hub answered with an error: {reason}") from error
