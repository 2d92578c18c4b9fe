"""Towers from the hub: their files at a pinned commit, as a local folder like any other.

Every loader then reads that folder, so that nothing depends on how each of them asks the hub. Only the files named here
are downloaded: no pickled weights, no code.
"""

from pathlib import Path

from huggingface_hub import snapshot_download

from vlm_vqa.errors import UserError
from vlm_vqa.hub import Repository, explained

WANTED = ["*.json", "*.safetensors", "tokenizer.model"]
"""Settings, weights and tokenizer of a model in Hugging Face's format."""
UNWANTED = ["*/*"]
"""Folders hold the same model for other programs, or its checkpoints."""


def downloaded(key: str, model: str, revision: str) -> Path:
    """Return the folder of a hub model at commit `revision`; what the cache lacks is downloaded.

    Args:
        key: the parameter's section, `vision` or `language`, for messages.

    Raises:
        UserError: it cannot be had, or has no weights in safetensors.
    """
    repository = Repository(f"{key}.model", model, f"{key}.revision", revision)
    with explained(repository):
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=WANTED, ignore_patterns=UNWANTED))
    if not list(folder.glob("*.safetensors")):
        raise UserError(
            f"{repository}: commit {revision} has no *.safetensors. Pickled weights (.bin) can run code when they are read, "
            "so they are not. Name a commit with safetensors, or a folder that transformers' save_pretrained has written."
        )
    return folder
