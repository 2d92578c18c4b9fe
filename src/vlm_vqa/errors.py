"""The one exception that is shown to a person without a traceback."""


class UserError(ValueError):
    """A mistake that the user can mend.

    The message names the culprit (file, row or id, the option's full key) and the next step. Stages and the command line
    print it alone and end with exit code 2; everything else keeps its traceback.
    """
