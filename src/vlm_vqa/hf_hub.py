"""The Hugging Face hub: which repository is meant, and one clear message for each way in which reading it can fail.

Every loader reads the folder into which `download_snapshot` has brought a tower at its pinned commit, so that nothing
depends on how each of them asks the hub; only the files named here are downloaded: no pickled weights, no code.
The token is huggingface_hub's own affair (HF_TOKEN, `hf auth login`): nothing here reads, passes or prints it.
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
    """A repository `owner/name` at a commit of 40 hex digits, and the parameters that name them, for messages."""

    key: str
    name: str
    revision_key: str
    revision: str
    type: str = "model"  # `model` or `dataset`, as huggingface_hub says it

    def __str__(self) -> str:
        return f"{self.key} {self.name!r}"

    @property
    def page(self) -> str:
        """Where a person looks at it. Licences are accepted there, whatever mirror the files come from."""
        return f"https://huggingface.co/{'datasets/' if self.type == 'dataset' else ''}{self.name}"


@contextmanager
def translate_errors(repository: Repository) -> Generator[None]:
    """Turn what huggingface_hub raises inside into a UserError that says what to do."""
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
    kind, page, commit = repository.type, repository.page, repository.revision
    licence = f"licence at {page} with your account, then {_TOKEN}."
    match error:
        case errors.GatedRepoError():
            return f"this {kind} is gated, and the hub does not let you read it. Accept its {licence}"
        case errors.RepositoryNotFoundError():
            missing = "it does not exist, or it is private or gated. Check the name; if it is right, ask for access or"
            return f"the hub shows no such {kind}: {missing} accept the {licence}"
        case errors.RevisionNotFoundError():
            lists = f"{page}/commits/main lists its commits; name one by its 40 hex digits."
            return f"it has no commit {commit!r} ({repository.revision_key}). {lists}"
        case errors.HFValidationError():
            return f"not a repository's name ({error}). Write owner/name."
        case errors.OfflineModeIsEnabled():
            load = (
                f"Run `hf download {repository.name} --repo-type {kind} --revision {commit}` where there is a network"
            )
            lacking = f"{commit} is not, or not whole, in {constants.HF_HUB_CACHE}. {load}"
            return f"HF_HUB_OFFLINE is set, and {lacking} (HF_HUB_CACHE names the folder), or unset HF_HUB_OFFLINE."
        case errors.HfHubHTTPError() if (status := error.response.status_code) in (401, 403):
            why = f"({status}): mistyped, expired, or without the right to read {repository.name}"
            mend = f"Make one at https://huggingface.co/settings/tokens, then {_TOKEN}."
            return f"the hub refuses the token that it was sent {why}. {mend}"
        case errors.HfHubHTTPError():
            return f"{constants.ENDPOINT} answers {error.response.status_code}. {_LATER}"
        case errors.HTTPError() | ConnectionError():
            return f"{constants.ENDPOINT} cannot be reached ({str(error) or type(error).__name__}). {_LATER}"
    return None


_LATER = (
    "Check the network and run the stage again, which goes on where it stopped; the environment variable HF_ENDPOINT "
    "names a mirror, and with HF_HUB_OFFLINE=1 only what has been downloaded before is used."
)

SETTINGS = ["*.json", "tokenizer.model"]  # settings and tokenizer of a model in Hugging Face's format
WANTED = [*SETTINGS, "*.safetensors"]  # its weights as well


def download_snapshot(key: str, model: str, revision: str, wanted: list[str] = WANTED) -> Path:
    """Return the folder of a hub model at commit `revision`; what the cache lacks of the files `wanted` is downloaded.
    `key` is the parameter that names it, for messages. UserError if it cannot be, or has no weights in safetensors."""
    repository = Repository(key, model, f"{key.partition('.')[0]}.revision", revision)
    with translate_errors(repository):
        # Folders hold the same model for other programs, or its checkpoints.
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=wanted, ignore_patterns=["*/*"]))
    if wanted is WANTED and not list(folder.glob("*.safetensors")):
        why = "Pickled weights (.bin) can run code when they are read, so they are not"
        other = "Name a commit with safetensors, or a folder that transformers' save_pretrained has written."
        raise UserError(f"{repository}: commit {revision} has no *.safetensors. {why}. {other}")
    return folder
