"""Files that are never half written, and logs with one JSON object a line."""

import json
import os
import tempfile
from pathlib import Path


def write_atomically(path, write, keep=None):
    """Let `write(file)` fill a temporary file in the same folder, flush it to the disk, then rename
    it to `path`. keep: the name that the file gets which was there before, if it is to stay.

    Whoever opens `path` finds the old content or the new, never half of it, whenever the power
    goes."""
    path = Path(path)
    file = tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False)
    try:
        with file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(file.name, 0o644)         # temporary files are private; results need not be
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(file.name, path)
    except BaseException:
        os.unlink(file.name)
        raise


def append_json(path, record):
    """One JSON object as one line at the end of a file."""
    with open(path, "a") as file:
        file.write(json.dumps(record) + "\n")


def read_json_lines(path):
    """All objects of such a file, [] if there is none.

    A last line that a power cut cut short has no newline: it is left out."""
    path = Path(path)
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def truncate_log(path, step):
    """Drop what was logged after `step`: a run that was cut off repeats those steps and logs
    them."""
    kept = [json.dumps(r) + "\n" for r in read_json_lines(path) if r["step"] <= step]
    write_atomically(path, lambda file: file.write("".join(kept).encode()))
