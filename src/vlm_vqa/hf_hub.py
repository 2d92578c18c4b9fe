"""The Hugging Face hub: which repository is meant, and one clear message for each way in which reading it can fail.

Towers are downloaded at their pinned commit into a local folder like any other (`download_snapshot`). Every loader then
reads that folder, so that nothing depends on how each of them asks the hub; only the files named here are downloaded: no
pickled weights, no code.

The token is huggingface_hub's own affair: it finds it in HF_TOKEN or where `hf auth login` has saved it. Nothing of this
project reads, passes or prints it.
"""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants, errors, snapshot_download

from vlm_vqa.errors import UserError
from vlm_vqa.secrets import causes

_TOKEN = "set the environment variable HF_TOKEN to a token of that account that may read it (or run `hf auth login`)"


@dataclass(frozen=True)
class Repository:
    """A repository at a commit, and the parameters that name them."""

    key: str
    """The parameter that names the repository, for messages."""
    name: str
    """`owner/name`."""
    revision_key: str
    revision: str
    """Its commit, 40 hex digits."""
    type: str = "model"
    """`model` or `dataset`, as huggingface_hub says it."""

    def __str__(self) -> str:
        return f"{self.key} {self.name!r}"

    @property
    def page(self) -> str:
        """Where a person looks at it. Licences are accepted there, whatever mirror the files come from."""
        return f"https://huggingface.co/{'datasets/' if self.type == 'dataset' else ''}{self.name}"


@contextmanager
def translate_errors(repository: Repository) -> Generator[None]:
    """Turn what huggingface_hub raises inside into one message that says what to do.

    Raises:
        UserError: instead of it.
    """
    try:
        yield
    except (errors.HTTPError, errors.HFValidationError, FileNotFoundError, ConnectionError) as error:
        # huggingface_hub wraps no network, and no repository, into a missing file.
        remedy = next(filter(None, (_remedy(repository, cause) for cause in causes(error))), None)
        if remedy is None:
            raise
        raise UserError(f"{repository}: {remedy}") from error


def _remedy(repository: Repository, error: BaseException) -> str | None:
    """Say what has happened and what to do about it, or None for what is not the hub's."""
    match error:
        case errors.GatedRepoError():
            return (
                f"this {repository.type} is gated, and the hub does not let you read it. Accept its licence at "
                f"{repository.page} with your account, then {_TOKEN}."
            )
        case errors.RepositoryNotFoundError():
            return (
                f"the hub shows no such {repository.type}: it does not exist, or it is private or gated. Check the name; if "
                f"it is right, ask for access or accept the licence at {repository.page} with your account, then {_TOKEN}."
            )
        case errors.RevisionNotFoundError():
            return (
                f"it has no commit {repository.revision!r} ({repository.revision_key}). {repository.page}/commits/main "
                "lists its commits; name one by its 40 hex digits."
            )
        case errors.HFValidationError():
            return f"not a repository's name ({error}). Write owner/name."
        case errors.OfflineModeIsEnabled():
            download = f"hf download {repository.name} --repo-type {repository.type} --revision {repository.revision}"
            return (
                f"HF_HUB_OFFLINE is set, and {repository.revision} is not, or not whole, in {constants.HF_HUB_CACHE}. Run "
                f"`{download}` where there is a network (HF_HUB_CACHE names the folder), or unset HF_HUB_OFFLINE."
            )
        case errors.HfHubHTTPError() if error.response.status_code in (401, 403):
            return (
                f"the hub refuses the token that it was sent ({error.response.status_code}): mistyped, expired, or without "
                f"the right to read {repository.name}. Make one at https://huggingface.co/settings/tokens, then {_TOKEN}."
            )
        case errors.HfHubHTTPError():
            return f"{constants.ENDPOINT} answers {error.response.status_code}. {_LATER}"
        case errors.HTTPError() | ConnectionError():
            return f"{constants.ENDPOINT} cannot be reached ({str(error) or type(error).__name__}). {_LATER}"
    return None


_LATER = (
    "Check the network and run the stage again, which goes on where it stopped; the environment variable HF_ENDPOINT "
    "names a mirror, and with HF_HUB_OFFLINE=1 only what has been downloaded before is used."
)


WANTED = ["*.json", "*.safetensors", "tokenizer.model"]
"""Settings, weights and tokenizer of a model in Hugging Face's format."""
UNWANTED = ["*/*"]
"""Folders hold the same model for other programs, or its checkpoints."""


SETTINGS = ["*.json", "tokenizer.model"]
"""Of these, all but the weights."""


def download_snapshot(key: str, model: str, revision: str, wanted: list[str] = WANTED) -> Path:
    """Return the folder of a hub model at commit `revision`; what the cache lacks is downloaded.

    Args:
        key: the parameter's section, `vision` or `language`, for messages.
        model, revision: as the parameters name them.
        wanted: the files, `WANTED` or `SETTINGS`.

    Raises:
        UserError: it cannot be downloaded, or has no weights in safetensors.
    """
    repository = Repository(f"{key}.model", model, f"{key}.revision", revision)
    with translate_errors(repository):
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=wanted, ignore_patterns=UNWANTED))
    if wanted is WANTED and not list(folder.glob("*.safetensors")):
        raise UserError(
            f"{repository}: commit {revision} has no *.safetensors. Pickled weights (.bin) can run code when they are read, "
            "so they are not. Name a commit with safetensors, or a folder that transformers' save_pretrained has written."
        )
    return folder
