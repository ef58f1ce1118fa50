"""What every command shares: errors of one line, and a command line made from a dataclass."""

import argparse
import dataclasses
import math
import os
import signal
import sys
from pathlib import Path


class UsageError(ValueError):
    """Something the user can mend: its text is one line that names the flag and the remedy.

    Commands end with exit code 2."""


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


def run_main(main):
    """Run a command. A UsageError is one line on stderr and exit code 2. Anything else is a bug,
    and shows its traceback. SIGTERM is like Ctrl-C."""
    def terminate(number, frame):
        raise KeyboardInterrupt(number)

    signal.signal(signal.SIGTERM, terminate)
    try:
        main()
    except UsageError as error:
        sys.exit(fail(error))
    except KeyboardInterrupt as stop:
        print("\ninterrupted; the same command continues a training run from its last checkpoint",
              file=sys.stderr)
        sys.exit(128 + (stop.args[0] if stop.args else signal.SIGINT))


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
        if field.metadata["range"] is None:
            continue
        value, (low, high) = getattr(config, field.name), field.metadata["range"]
        if math.isinf(value) or not low <= value <= high:       # not: also refuses nan
            bounds = f"{low} or more" if high == math.inf else f"from {low} to {high}"
            raise UsageError(f"{flag(field.name)} {value}: must be {bounds}")
