"""A file that is the old one or the new one, whenever the process or the machine stops."""

from __future__ import annotations

import contextlib
import os
import secrets


def replace_file(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file whole or not at all.

    The data goes into a file beside it, and onto the disk, before that takes its name; then the
    name goes onto the disk. A process that is killed in between leaves ``.NAME.*.tmp``, which
    nobody reads. A link stays a link, and a file that is there keeps its permissions.
    """
    path = os.path.realpath(path)
    folder, name = os.path.split(path)
    beside = os.path.join(folder, f".{name}.{secrets.token_hex(8)}.tmp")
    file = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        with open(file, "wb") as writer:
            writer.write(data)
            writer.flush()
            with contextlib.suppress(FileNotFoundError):
                os.chmod(beside, os.stat(path).st_mode & 0o7777)
            os.fsync(writer.fileno())
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(beside)
        raise
    if os.name == "posix":  # elsewhere a folder cannot be opened
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
