"""Train a relative of MAE. Flags of train.py work, but for those that make the method.

    python -m extras.relatives                            # lists them
    python -m extras.relatives cae --data shapes
    python -m extras.relatives cae --help
"""

import sys
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import train
from support.checkpoint import RELATIVES
from support.command_line import Parser, run_main


def main(argv=None):
    parser = Parser(prog="python -m extras.relatives", usage="%(prog)s NAME [--flag value ...]",
                    description=__doc__.split("\n")[0], add_help=False)
    parser.add_argument("name", nargs="?", choices=RELATIVES)
    name, *flags = (sys.argv[1:] if argv is None else argv) or [None]
    if name in (None, "-h", "--help"):
        for each in RELATIVES:
            print(import_module(f"extras.relatives.{each}").__doc__.split("\n")[0])
        return
    parser.parse_args([name])
    train.main(flags, import_module(f"extras.relatives.{name}"))


if __name__ == "__main__":
    sys.argv[0] = "extras.relatives"                       # what an error names
    run_main(main)
