"""Files that are never half written, and logs with one JSON object a line."""

import json
import os
import tempfile
from pathlib import Path

from support.command_line import UsageError


def write_atomically(path, write, keep=None):
    """Let `write(file)` fill a temporary file in the same folder, flush it to the disk, then rename
    it to `path`. keep: the name that the file gets which was there before, if it is to stay.

    Whoever opens `path` finds the old content or the new, never half of it, whenever the power
    goes or the disk is full. An OSError names `path`."""
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
    except BaseException as error:
        os.unlink(file.name)
        for each in (error, error.__context__):            # torch.save hides it behind its own
            if isinstance(each, OSError) and each.errno:
                each.filename = str(path)
        raise


def append_json(path, record):
    """One JSON object as one line at the end of a file: all of it, or where the disk is full
    nothing."""
    line = (json.dumps(record) + "\n").encode()
    with open(path, "ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        try:
            while line:
                line = line[file.write(line):]
        except OSError as error:
            file.truncate(end)
            error.filename = str(path)
            raise


def read_json_lines(path):
    """All objects of such a file, [] if there is none. Raises UsageError for one that is none.

    A last line that a power cut cut short has no newline: it is left out."""
    path = Path(path)
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [parse_json(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def read_json(path):
    """The object in a file of JSON. Raises UsageError for a file that holds none."""
    return parse_json(Path(path).read_bytes(), path)


def parse_json(content, where):
    """Bytes -> an object. They are decoded as the standard says, whatever the locale: UTF-8, or
    UTF-16 or -32, with or without a mark at the beginning."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: is not JSON ({error}); mend it") from error
    if not isinstance(found, dict):
        raise UsageError(f"{where}: holds no JSON object {{...}}; mend it")
    return found


def truncate_log(path, step):
    """Drop what was logged after `step`: a run that was cut off repeats those steps and logs
    them."""
    kept = [json.dumps(r) + "\n" for r in read_json_lines(path) if r["step"] <= step]
    write_atomically(path, lambda file: file.write("".join(kept).encode()))
