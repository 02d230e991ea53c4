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
    """`path_or_repo[@revision]`, as recipes write it."""

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
    def repo(self) -> tuple[str, str | None] | None:
        """The reference read as (repository id, revision), or None where it cannot be one."""
        name, _, revision = self.text.partition("@")
        return (name, revision or None) if REPO_ID.fullmatch(name) else None

    def __str__(self) -> str:
        return self.text


def locate(reference: ModelReference) -> Path:
    """Return the local folder (or single weight file) of a model.

    A path that exists is taken as it is; anything else of the form `org/name[@revision]` is
    fetched through `huggingface_hub` (its cache, token and offline mode hold), weights and
    configuration only, code never run.

    Raises
    ------
    CheckpointError
        Where there is neither a path nor a repository, or the Hub refuses or cannot be reached.
    """
    if reference.exists():
        return reference.path
    if "+" in reference.text:
        raise CheckpointError(
            f"{reference}: LoRA adapters as experts are not supported yet",
            fix="merge the adapter into its base model and name that folder",
        )
    if reference.repo is None:
        raise CheckpointError(
            f"{reference}: no such file or folder",
            expected="a checkpoint folder, a .safetensors file, or a Hub id org/name[@revision]",
        )
    return _download(*reference.repo)


def _download(repo: str, revision: str | None) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    def fetch(weights: tuple[str, ...]) -> Path:
        return Path(
            huggingface_hub.snapshot_download(
                repo,
                revision=revision,
                allow_patterns=[*weights, *COMPANIONS],
                ignore_patterns=["*/*"],
            )
        )

    where = repo if revision is None else f"{repo}@{revision}"
    fix = "check the spelling; a local checkpoint is named by its path"
    try:
        for weights in WEIGHTS:
            folder = fetch(weights)
            if any(found for pattern in weights for found in folder.glob(pattern)):
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
