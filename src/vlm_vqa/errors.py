"""The one exception that is shown to a person without a traceback."""

import sys

from vlm_vqa.secrets import mask, without_secrets


class UserError(ValueError):
    """A mistake that the user can mend: the message names the culprit (file, row or id, the option's full key) and the
    next step. Stages and the command line print it alone and end with exit code 2; everything else keeps its traceback.
    Neither it nor the errors that it is raised from show a password or a token in an address."""

    def __init__(self, message: str):
        super().__init__(without_secrets(message))
        mask(sys.exception())


def make_again(stages: str) -> str:
    """Say which command mends damaged outputs of stages: `dvc repro --force` would link the damaged ones back."""
    return f"Run `vlm-vqa repair {stages}`: it removes what is damaged and makes it again."


GO_ON = "Run `dvc repro` again to go on; should it call its rwlock or dvc.lock damaged, `vlm-vqa unlock` before it."
"""What to do after an interruption."""
