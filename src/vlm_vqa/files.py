"""Files from strangers: read only where they are regular and of a size that memory holds; and folders claimed by a lock."""

import errno
import fcntl
import logging
import os
import stat
from pathlib import Path
from typing import IO

from vlm_vqa.errors import UserError

log = logging.getLogger(__name__)

MOST_BYTES = 2**31  # of a file that is read whole; VQAv2's largest has 0.4 GB


def check_regular(path: str | Path, most: int = MOST_BYTES) -> None:
    """Refuse, by OSError, what has no end or never begins (a pipe, a device, a socket), is too large, or is not there."""
    found = os.stat(path)
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "a pipe, socket or device, not a file", str(path))
    if found.st_size > most:
        raise OSError(errno.EFBIG, f"{found.st_size:,} bytes, more than {most:,}", str(path))


def claim(lock: Path, busy: str) -> IO[str]:
    """Hold a lock until the process ends; the caller keeps what is returned. UserError `busy` if another process has it."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    file = open(lock, "a", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise UserError(busy) from error
    except OSError as error:
        # Some shared file systems know no locks; they must not keep anyone from working.
        log.warning("%s cannot be locked (%s): do not start a second run here", lock, error)
    return file
