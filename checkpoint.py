"""The files of a run: one checkpoint from which it continues, its config, its log; and weights of others.

`checkpoint.pt` is a dictionary of plain data and tensors, so that it loads with `weights_only=True` (no code in it is
ever executed): `model` (state_dict), `arch` (arguments of MaskedAutoencoder), `optimizer`, `step`, `config`, `mean`,
`std`. Random states are not in it because there are none: every random number of a run is a function of (seed, step).
"""

import argparse
import json
import math
import os
import sys
import tempfile
from pathlib import Path

import torch

from extras.command_line import UsageError


def write_atomically(path, write):
    """Let `write(file)` fill a temporary file in the same folder, flush it to the disk, then rename it to `path`.

    Whoever opens `path` finds the old content or the new, never half of it, whenever the power goes."""
    path = Path(path)
    file = tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False)
    try:
        with file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(file.name, 0o644)         # temporary files are private; results need not be
        os.replace(file.name, path)
    except BaseException:
        os.unlink(file.name)
        raise


def save_checkpoint(path, content):
    write_atomically(path, lambda file: torch.save(content, file))


def load_checkpoint(path):
    """The dictionary at `path`, tensors on the CPU. Raises UsageError if there is none or it cannot be read."""
    if not Path(path).is_file():
        raise UsageError(f"checkpoint {path}: there is no such file (it is the file checkpoint.pt in the folder of a run)")
    try:
        # official MAE training checkpoints carry their argparse.Namespace, which is plain data too
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UsageError(f"checkpoint {path}: not a checkpoint that can be read safely "
                         f"({type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]})") from error


def read_weights(path):
    """Weights of ours, of the official MAE code or of timm -> state_dict, info (`arch`, `mean`, `std`; {} for others)."""
    file = load_checkpoint(path)
    state = next((file[k] for k in ("model", "state_dict") if k in file), file) if isinstance(file, dict) else {}
    lacking = {"patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight"} - state.keys()
    if lacking:
        raise UsageError(f"checkpoint {path}: holds no vision transformer (no {', '.join(sorted(lacking))})")
    return state, (file if "arch" in file else {})


def load_weights(model, state):
    """Copy the tensors of `state` into the model; one line on stderr lists what one of the two has and the other lacks.

    Works for official MAE files (full or encoder only), timm's ViTs and our own. Raises UsageError where shapes differ."""
    own = model.state_dict()
    wrong = [f"{k}: {list(state[k].shape)} in the file, {list(own[k].shape)} in this model"
             for k in own if k in state and own[k].shape != state[k].shape]
    if wrong:
        raise UsageError(f"weights of another geometry ({wrong[0]})")
    missing, unexpected = model.load_state_dict(state, strict=False)
    lists = [("skipped, no place for them", unexpected), ("not in the file, left as they were", missing)]
    text = "; ".join(f"{what}: {', '.join(keys)}" for what, keys in lists if keys)
    if text:
        print(f"loaded {len(own) - len(missing)} tensors; {text}", file=sys.stderr)


def geometry(state, num_heads=None):
    """Arguments of VisionTransformer read off the shapes of its weights, for files that do not say. Square images.

    The number of heads leaves no trace in the shapes: it is D / 64 in all standard ViTs but huge (1280 wide, 16 heads)."""
    D, C, *patch = state["patch_embed.proj.weight"].shape
    if num_heads is None:
        num_heads = 16 if D == 1280 else max(1, D // 64)
        print(f"the file does not say how many heads there are: taken as {num_heads}", file=sys.stderr)
    if D % num_heads:
        raise UsageError(f"--num-heads {num_heads}: must divide the width of {D}")
    side = math.isqrt(state["pos_embed"].shape[1] - 1)
    return dict(img_size=(side * patch[0], side * patch[1]), patch_size=tuple(patch), in_chans=C, embed_dim=D,
                depth=1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks.")),
                num_heads=num_heads,
                mlp_ratio=state["blocks.0.mlp.fc1.weight"].shape[0] / D)


def same_config(old, new, free):
    """Refuse to continue a run with other settings; the names in `free` (device, workers, ...) may change."""
    differ = [k for k in sorted(old.keys() | new.keys()) if k not in free and old.get(k) != new.get(k)]
    if differ:
        raise UsageError("--out {}: holds a run with other settings: {}; use another --out, or delete that folder".format(
            new["out"], ", ".join(f"{k} was {old.get(k)!r}, now {new.get(k)!r}" for k in differ)))


def append_json(path, record):
    """One JSON object as one line at the end of a file."""
    with open(path, "a") as file:
        file.write(json.dumps(record) + "\n")


def read_json_lines(path):
    """All objects of such a file, [] if there is none. A last line cut short by a power cut has no newline: left out."""
    lines = Path(path).read_text().splitlines(keepends=True) if Path(path).exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def truncate_log(path, step):
    """Drop what was logged after `step`: a run that was cut off repeats those steps and logs them again."""
    kept = "".join(json.dumps(r) + "\n" for r in read_json_lines(path) if r["step"] <= step)
    write_atomically(path, lambda file: file.write(kept.encode()))
