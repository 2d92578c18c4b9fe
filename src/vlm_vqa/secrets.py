"""Passwords and tokens in addresses: kept out of all that a person reads and of all that is stored: messages
(`UserError`), log lines and tracebacks (`mask_output`), what MLflow is told."""

import logging
import re
import sys
import threading
import traceback
from collections.abc import Iterator
from typing import Any

_RULES = (
    # A user's name and password. After a colon that begins no port, all up to the word's last @ may be a password: people
    # do not always encode what should be. The second line: as some write a proxy, without a scheme.
    (
        r"(?<=://)(?:(?!\[)[^\s:/?#@]*:(?!\d*[/?#])\S*|[^\s/?#'\"<>]*)@"
        r"|(?<![^\s'\"(=])[^\s:/?#@'\"(=]+:[^\s/@'\"]+@(?=[\w\[])",
        "",
    ),
    # All of a query, of an address or of a path alone as urllib3 names it. Signed links carry their key there.
    (r"(://[^\s?#'\"<>]*\?|(?<![^\s'\"(=])/[^\s?#'\"<>]*\?(?=[^\s#'\"<>=]*=))[^\s#'\"<>]*[^\s#'\"<>:;,.)\]]", r"\1***"),
    # A header that a library shows because it cannot be sent.
    (r"(?i)\b(bearer|authorization: basic)\s+[^\s'\"]+", r"\1 ***"),
)


def without_secrets(text: str) -> str:
    """Return `text` with the addresses in it freed of logins (left out) and of queries (`?***`)."""
    for pattern, instead in _RULES:
        text = re.sub(pattern, instead, text)
    return text


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what led to it: libraries wrap what the system or another library said."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def mask(error: BaseException | None) -> None:
    """Free the texts of an exception, of those that it holds and of those that led to it; libraries quote addresses."""
    for one in causes(error):
        for inner in one.args:
            if isinstance(inner, BaseException):
                mask(inner)
        one.args = tuple(without_secrets(part) if isinstance(part, str) else part for part in one.args)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return without_secrets(super().format(record))


def mask_output(form: str, level: int, force: bool = False) -> None:
    """As `logging.basicConfig` on stderr, but that neither log lines nor tracebacks show secrets."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(form))
    logging.basicConfig(level=level, handlers=[handler], force=force)
    sys.excepthook = _show
    threading.excepthook = lambda told: _show(*told[:3])


def _show(*error: Any) -> None:
    # A thread may end by SystemExit, of which Python says nothing either.
    if not issubclass(error[0], SystemExit):
        print(without_secrets("".join(traceback.format_exception(*error))), end="", file=sys.stderr, flush=True)
