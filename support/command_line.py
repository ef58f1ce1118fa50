"""What every command shares: errors of one line, and a command line made from a dataclass."""

import argparse
import dataclasses
import errno
import math
import multiprocessing
import os
import shutil
import signal
import sys
from pathlib import Path


class UsageError(ValueError):
    """Something the user can mend: its text is one line that names the flag and the remedy.

    Commands end with exit code 2."""

    def __init__(self, text):
        if "Traceback" not in text:                        # a worker's, which is for `fail`
            text = " ".join(text.splitlines())             # a file's name may hold a line break
        super().__init__(text)


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one line, and flags are not abbreviated."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message):
        sys.exit(fail(f"{message} ({self.prog} --help lists what there is)"))


def fail(message):
    """Print the one line; return the exit code of a usage error.

    A DataLoader worker hands its error on as a traceback: the last line says what it is. Of several
    processes each prints, as an error may be of one of them alone."""
    line = str(message).strip().splitlines()[-1]
    line = line.removeprefix(f"{UsageError.__module__}.{UsageError.__qualname__}: ")
    rank = os.environ.get("RANK", "0")
    process = "" if rank == "0" else f" (process {rank})"
    print(f"{Path(sys.argv[0]).name}: error: {line}{process}", file=sys.stderr)
    return 2


def say(text):
    """One line on stderr, of several processes by the first alone."""
    if os.environ.get("RANK", "0") == "0":
        print(" ".join(text.splitlines()), file=sys.stderr, flush=True)    # also of odd names


def shortened(names):
    """The first of some names, as text."""
    return ", ".join(names[:5]) + ", ..." * (len(names) > 5)


def run_main(main):
    """Run a command. A UsageError, and whatever runs out, is one line on stderr and exit code 2.
    Anything else is a bug, and shows its traceback. SIGTERM is like Ctrl-C."""
    def terminate(number, frame):
        raise KeyboardInterrupt(number)

    signal.signal(signal.SIGTERM, terminate)
    try:
        main()
    except UsageError as error:
        sys.exit(fail(error))
    except Exception as error:
        line = what_ran_out(error)
        if line is None:
            raise
        sys.unraisablehook = lambda _: None    # what is only half made complains when it ends
        if hasattr(signal, "SIGCHLD"):         # where torch would complain of the end of a worker
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for worker in multiprocessing.active_children():   # stuck, it would be waited for
            worker.kill()
        sys.exit(fail(line))
    except KeyboardInterrupt as stop:
        print("\ninterrupted; the same command continues a training run from its last checkpoint",
              file=sys.stderr)
        sys.exit(128 + (stop.args[0] if stop.args else signal.SIGINT))


# What the machine lacks: number of an OSError, and the remedy.
FULL = (errno.ENOSPC, errno.EDQUOT)
REMEDIES = dict.fromkeys(FULL, "make room, or write to another disk (--out); what was there before "
                         "is whole, and training goes on from it")
REMEDIES |= dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the limit (ulimit -n 4096), or use "
                          "--workers 0")
REMEDIES |= dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "see who may read and write it "
                          "(ls -l), or name another one")
REMEDIES |= dict.fromkeys((errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR), "name another one")
REMEDIES |= {errno.EFBIG: "raise the limit (ulimit -f unlimited)",
             errno.EAGAIN: "use fewer --workers, or raise the limit (ulimit -u)",
             errno.EPIPE: "the program that read what is printed has ended"}
REMEDIES[errno.ENOENT] = "name one that is there"
REMEDIES[errno.EIO] = "the disk or its connection fails; try again, or copy the data elsewhere"
# The same where torch says it in words of its own, in a RuntimeError, perhaps of a worker.
SHARED_MEMORY = ("the shared memory that workers hand their images over in is full; raise it "
                 "(docker run --shm-size 8g), or use --workers 0")
WORDS = {"shared memory": SHARED_MEMORY, "</torch_": SHARED_MEMORY, "Bus error": SHARED_MEMORY,
         "Too many open files": "too many open files; " + REMEDIES[errno.EMFILE],
         "ancdata": "too many open files; " + REMEDIES[errno.EMFILE],
         "is killed by signal: Killed": "the memory of this machine is too small: a worker was "
         "killed; use fewer --workers, or --workers 0",
         "exited unexpectedly": "a worker that decodes images ended; --workers 0 shows why",
         "can't start new thread": "too many threads; " + REMEDIES[errno.EAGAIN]}
NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory",
             "Cannot allocate memory", "ALLOC_FAILED")


def lacks_memory(error):
    """Whether an error says that the memory of the device is too small (not: that of workers)."""
    text = str(error)
    return isinstance(error, MemoryError) or (
        any(words in text for words in NO_MEMORY) and not any(words in text for words in WORDS))


def what_ran_out(error):
    """One line for an error of a machine that lacks something, None for any other.

    Where a file cannot be written torch says "unexpected pos": the reason is the OSError before."""
    if isinstance(error, (RuntimeError, OSError)):
        for words, line in WORDS.items():
            if words in str(error):
                return line
    if lacks_memory(error):
        return ("the memory is too small; use a smaller --batch-size, --img-size or --resident-gb, "
                "or another --device")
    while error is not None:
        if isinstance(error, OSError) and error.errno in REMEDIES:
            where, reason = error.filename or "a file", error.strerror
            if error.errno in FULL:
                folder = Path(where).absolute().parent
                there = folder if folder.is_dir() else Path.cwd()
                reason += f" ({shutil.disk_usage(there).free / 1e6:.1f} MB are free)"
            return f"{where}: {reason}; {REMEDIES[error.errno]}"
        error = error.__cause__ or error.__context__
    return None


def make_folder(path, flag):
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror
        raise UsageError(f"{flag} {path}: cannot be made a folder ({reason})") from error


# ------------------------------------------------------------------------ a dataclass as flags

def option(default, help, type=None, choices=None, range=None):
    """A field of a dataclass of settings. range: least and greatest value."""
    metadata = {"help": help, "type": type, "choices": choices, "range": range}
    return dataclasses.field(default=default, metadata=metadata)


def flag(name):
    """The flag of a field: mask_ratio -> --mask-ratio."""
    return "--" + name.replace("_", "-")


def size(text):
    """The type of --img-size and --patch-size: "32", or "48x64" for height and width."""
    numbers = [int(n) if n.isdecimal() else 0 for n in text.split("x")]
    if len(numbers) > 2 or min(numbers) < 1:
        raise ValueError(f"{text!r} is none: write N or HxW, as in 64 or 48x64")
    return numbers[0] if len(numbers) == 1 else numbers


def numbers(text):
    """The type of --pixel-mean and --pixel-std: "0.5", or "0.485,0.456,0.406" for red, green, blue.
    A list."""
    try:
        return [float(each) for each in text.split(",")]
    except ValueError:
        raise ValueError(f"{text!r} is none: write a number, or one for each channel, as in "
                         "0.485,0.456,0.406") from None


def path(text):
    """The type of a flag that takes a path. `~` is the home folder, which a shell leaves alone
    after `=`; a path as Windows writes it is read too."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty; name a file or a folder")
    found = os.path.expanduser(text)
    if found.startswith("~"):
        raise argparse.ArgumentTypeError(f"{text!r}: nobody here has this name; write ./{text} for "
                                         "a file that is called so")
    if os.sep == "/" and "\\" in found and not os.path.exists(found):
        found = found.replace("\\", "/")
    return found


def in_its_words(parse):
    """A type for argparse, which otherwise hides what the ValueError of a type says."""
    def convert(text):
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
    return convert


def given_flags(Config, argv, description, epilog, groups=()):
    """The flags of a command line as {field: value}, only those that were given.

    groups: {a field: heading in --help of this field and those that follow}."""
    parser = Parser(usage="%(prog)s [--flag value ...]", description=description, epilog=epilog)
    group = parser
    for field in dataclasses.fields(Config):
        if field.name in groups:
            group = parser.add_argument_group(groups[field.name])
        meta = field.metadata
        note = "" if field.default is None else f" (default: {field.default})"
        if field.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        elif meta["choices"]:
            kind = {"type": field.type, "choices": meta["choices"]}
        elif meta["type"]:
            kind = {"type": in_its_words(meta["type"]), "metavar": "X"}
        else:
            kind = {"type": field.type, "metavar": "X"}
        text = (meta["help"] + note).replace("%", "%%")    # argparse's way to write one %
        group.add_argument(flag(field.name), default=None, help=text, **kind)
    return {name: value for name, value in vars(parser.parse_args(argv)).items()
            if value is not None}


def check_ranges(config):
    """Raises UsageError for a number outside the range of its field."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.metadata["range"] is None or value is None:           # None: still open
            continue
        low, high = field.metadata["range"]
        if value == math.inf or not low <= value <= high:       # not: also refuses nan
            bounds = f"{low} or more" if high == math.inf else f"from {low} to {high}"
            raise UsageError(f"{flag(field.name)} {value}: must be {bounds}")
