"""The files of a run: one checkpoint from which it continues, its config, its log; and weights of others.

`checkpoint.pt` is a dictionary of plain data and tensors, so that it loads with `weights_only=True` (no code in it is
ever executed): `model` (the student's state_dict), `arch` (arguments of Student), `labelling_teacher` and `reconstruction_teacher`
as far as the recipe has them, `centres`, `optimizer`, `step`, `config`, `mean`, `std`. Random states are not in it because there are none: every random number of a run is a function of (seed, step).
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
from extras.images import IMAGENET_MEAN, IMAGENET_STD


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


NETWORKS = {"student": "model", "labelling-teacher": "labelling_teacher", "reconstruction-teacher": "reconstruction_teacher"}


def read_encoder(path, num_heads=None, network=None):
    """Weights of ours, of the official MAE code or of timm -> state_dict, arguments of VisionTransformer, info (see load_encoder).

    network: one of NETWORKS; None stands for the student, or RC-MAE's teacher."""
    file = load_checkpoint(path)
    ours = isinstance(file, dict) and "arch" in file
    if network is None:
        network = "reconstruction-teacher" if ours and file.get("config", {}).get("consistency_weight") else "student"
    if network != "student" and NETWORKS[network] not in file:
        there = [name for name, key in NETWORKS.items() if key in file]
        raise UsageError(f"--network {network}: checkpoint {path} has none; it has {', '.join(there) or 'a student alone'}")
    keys = (NETWORKS[network],) if ours else ("model", "state_dict")
    state = next((file[k] for k in keys if k in file), file) if isinstance(file, dict) else {}
    lacking = {"patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight"} - state.keys()
    if lacking:
        raise UsageError(f"checkpoint {path}: holds no vision transformer (no {', '.join(sorted(lacking))})")
    arch = file["arch"] if ours else geometry(state, num_heads)
    info = {k: v for k, v in file.items() if k in ("arch", "config", "step", "mean", "std")} if ours else dict(
        mean=IMAGENET_MEAN if arch["in_chans"] == 3 else [0.5] * arch["in_chans"],
        std=IMAGENET_STD if arch["in_chans"] == 3 else [0.5] * arch["in_chans"])
    return state, arch, dict(info, network=network)


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


def continue_from(path, config, free, mean, images):
    """The checkpoint of a run to continue, None if there is none. A run with other settings or images is refused with the
    settings that differ; those in `free` (device, workers, ...) may."""
    if not Path(path).exists():
        return None
    saved, out = load_checkpoint(path), f"--out {config['out']}"
    if "config" not in saved or "optimizer" not in saved:
        raise UsageError(f"{out}: its checkpoint.pt is not of train.py; use another --out")
    old = saved["config"]
    differ = [k for k in sorted(old.keys() | config.keys()) if k not in free and old.get(k) != config.get(k)]
    if differ:
        raise UsageError(f"{out}: holds a run with other settings: {{}}; use another --out, or delete that folder".format(
            ", ".join(f"{k} was {old.get(k)!r}, now {config.get(k)!r}" for k in differ)))
    if (saved["mean"], saved["images"]) != (mean, images):
        raise UsageError(f"{out}: holds a run on other images; use another --out, or delete that folder")
    return saved


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
