"""An encoder out of a file of weights: a checkpoint of ours, of the official MAE code, or of timm."""

import math
import sys

from checkpoint import load_checkpoint
from extras.command_line import UsageError
from extras.images import IMAGENET_MEAN, IMAGENET_STD, image_transform

NETWORKS = {"student": "model", "labelling-teacher": "labelling_teacher", "reconstruction-teacher": "reconstruction_teacher"}
ENCODER_ARGUMENTS = ("img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio")


def load_encoder(path, num_heads=None, network=None):
    """A checkpoint of train.py, or a file of official MAE or timm weights -> encoder, transform.

    encoder: a VisionTransformer in eval mode (B C H W -> B 1+N D); its `info` has `mean` and `std` of training (ImageNet's for
    others' files), and of a file of ours its `arch`, `config`, `step`. transform: PIL image -> its input, C H W. network:
    "student", or one of the teachers that the run had; None: what its recipe is judged by (RC-MAE: the teacher)."""
    from mae import VisionTransformer                      # not above, as mae.py offers this function

    state, arch, info = read_encoder(path, num_heads, network)
    encoder = VisionTransformer(**{k: arch[k] for k in ENCODER_ARGUMENTS})
    load_weights(encoder, {k: v for k, v in state.items() if not k.startswith(("decoder_", "mask_token", "class_head", "data_head"))})
    encoder.info = info
    return encoder.eval().requires_grad_(False), image_transform(encoder.img_size, encoder.in_chans, info["mean"], info["std"])


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
