"""Encoders out of files and into files: ours, official MAE ones, timm's, Hugging Face's.

    encoder, transform = load_encoder("runs/pl-mae-shapes-micro/checkpoint.pt")
    tokens = encoder(transform(Image.open("cat.jpg"))[None])               # 1 1+N D

`export` writes an encoder for timm and for Hugging Face. `start_from` is train.py's --init.
"""

import json
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from mae import MaskedAutoencoder, VisionTransformer, pair
from support.checkpoint import is_of_train, load_checkpoint, save_checkpoint
from support.command_line import UsageError, make_folder
from support.files import write_atomically
from support.images import IMAGENET_MEAN, IMAGENET_STD, image_transform
from support.settings import kept_network

NETWORKS = {"student": "student", "labelling-teacher": "labelling_teacher",
            "reconstruction-teacher": "reconstruction_teacher"}        # name: key in the file


def load_weights(path, flag="--checkpoint"):
    """`load_checkpoint`; but of what extras/ trained further, the encoder alone (`exported`)."""
    file = load_checkpoint(path, flag)
    tuned = isinstance(file, dict) and {"tuned", "encoder"} <= file.keys()
    return file["encoder"] if tuned else file


# ------------------------------------------------------------- names of the official MAE code

def to_official(mae):
    """A MaskedAutoencoder's state_dict in the names of the official MAE code (He et al. 2022).

    Two rules: the encoder's names lose their prefix, `encoder.norm.bias` -> `norm.bias`; the
    decoder's get another one, `decoder.norm.bias` -> `decoder_norm.bias`, but for the mask token.
    The encoder's names are timm's as well."""
    return {official_name(name): value for name, value in mae.state_dict().items()}


def official_name(name):
    if name == "decoder.mask_token":
        return "mask_token"
    return name.removeprefix("encoder.").replace("decoder.", "decoder_", 1)


def from_official(mae, state):
    """Copy the weights of an official state_dict into a MaskedAutoencoder. Raises UsageError where
    one has what the other lacks, or where shapes differ."""
    fill(mae, {official_name(name): name for name in mae.state_dict()}, state)


def fill(module, names, state):
    """Load state (a file's names) into the module; names: {the file's name: the module's name}."""
    own = module.state_dict()
    missing = names.keys() - state.keys()
    left_over = state.keys() - names.keys()
    if missing or left_over:
        parts = [f"{what} {', '.join(sorted(keys)[:3])}{', ...' if len(keys) > 3 else ''}"
                 for what, keys in (("it lacks", missing), ("no place for", left_over)) if keys]
        raise UsageError(f"weights of another network: {'; '.join(parts)}")
    for theirs, ours in names.items():
        if state[theirs].shape != own[ours].shape:
            raise UsageError(
                f"weights of another geometry: {theirs} is {list(state[theirs].shape)} in the "
                f"file, {list(own[ours].shape)} in this network")
    module.load_state_dict({ours: state[theirs] for theirs, ours in names.items()})


def start_from(student, path, target):
    """--init: copy the encoder of a file into a new student, and its decoder if it has one that
    predicts the same target -> mean and std of the pixels that these weights are used to.

    path: a checkpoint of train.py (its student), official MAE weights, timm's, or an export. The
    heads of the pseudo labels stay new. Codes of places are interpolated if images have another
    size there. Raises UsageError for a file that is none, or of another network."""
    file, own = load_weights(path, "--init"), sizes(student.mae.encoder)
    try:
        if is_of_train(file):
            encoder, info = encoder_of_run(path, file, "student")
        else:                              # shapes do not tell how many heads there are
            encoder, info, _ = encoder_of_others(path, file, own["heads"])
    except UsageError as error:
        raise UsageError(str(error).replace("--checkpoint", "--init")) from error
    if encoder.patch_size == student.mae.encoder.patch_size:
        resize_positions(encoder, own["img_size"])
    theirs = sizes(encoder)
    if theirs != own:
        differ = ", ".join(f"{name} {theirs[name]} there, {own[name]} here" for name in own
                           if theirs[name] != own[name])
        raise UsageError(f"--init {path}: another network, {differ}; make them alike with --model "
                         "and --patch-size")
    student.mae.encoder.load_state_dict(encoder.state_dict())
    taken = "its encoder"
    if is_of_train(file):
        same = file["config"]["target"] == target
        state = {official_name(name.removeprefix("mae.")): value
                 for name, value in file["student"].items()}
    else:
        same, state = target == "pixels", weights_of(file)
    if student.mae.decoder is not None and same and "mask_token" in state:
        names = {official_name(f"decoder.{name}"): name
                 for name in student.mae.decoder.state_dict()}
        try:
            fill(student.mae.decoder, names,
                 {name: value for name, value in state.items() if name in names})
            taken += " and decoder"
        except UsageError as error:
            print(f"--init {path}: its decoder does not fit, {error}", file=sys.stderr)
    print(f"starts from {path}: {taken}, and the mean and std of pixels that it is used to",
          file=sys.stderr)
    return info["mean"], info["std"]


def sizes(encoder):
    """What two encoders must have in common to share weights."""
    block = encoder.blocks[0]
    return {"img_size": encoder.img_size, "patch_size": encoder.patch_size,
            "channels": encoder.in_chans, "width": encoder.cls_token.shape[-1],
            "depth": len(encoder.blocks), "heads": block.attn.num_heads,
            "width inside the MLP": block.mlp.fc1.out_features}


# ------------------------------------------------------------------------ to timm and Hugging Face

def to_hugging_face(state):
    """An encoder's state_dict in the names of a saved ViTModel of Hugging Face. It keeps queries,
    keys and values apart, which timm and we have in one matrix."""
    renamed = [("patch_embed.proj", "embeddings.patch_embeddings.projection"),
               ("pos_embed", "embeddings.position_embeddings"),
               ("cls_token", "embeddings.cls_token"), ("blocks.", "encoder.layer."),
               ("norm1", "layernorm_before"), ("norm2", "layernorm_after"),
               ("attn.proj", "attention.output.dense"), ("mlp.fc1", "intermediate.dense"),
               ("mlp.fc2", "output.dense")]
    found = {}
    for name, value in state.items():
        if name.startswith("norm."):                       # the last one, not that of a block
            name = name.replace("norm", "layernorm")
        for ours, theirs in renamed:
            name = name.replace(ours, theirs)
        if "attn.qkv" in name:
            for part, each in zip(("query", "key", "value"), value.chunk(3)):
                found[name.replace("attn.qkv", f"attention.attention.{part}")] = each.clone()
        else:
            found[name] = value
    return found


def export(encoder, info, folder):
    """Write an encoder for other libraries -> lines that load it there.

    encoder.pt       weights in the names of timm (and of the official MAE code), and mean, std and
                     number of heads; also for --checkpoint and --init
    config.json, pytorch_model.bin         a ViTModel of Hugging Face
    load.py          the lines"""
    folder = Path(folder)
    make_folder(folder, "--out")
    (H, W), (ph, pw), channels, D, depth, heads, hidden = sizes(encoder).values()
    encoder = encoder.cpu()
    state = encoder.state_dict()
    save_checkpoint(folder / "encoder.pt", exported(encoder, info["mean"], info["std"]))
    save_checkpoint(folder / "pytorch_model.bin", to_hugging_face(state))
    size, patch = H if H == W else [H, W], ph if ph == pw else [ph, pw]
    config = {"architectures": ["ViTModel"], "model_type": "vit", "image_size": size,
              "patch_size": patch, "num_channels": channels, "hidden_size": D,
              "num_hidden_layers": depth, "num_attention_heads": heads, "intermediate_size": hidden,
              "hidden_act": "gelu", "layer_norm_eps": 1e-6, "qkv_bias": True}
    text = json.dumps(config, indent=2) + "\n"
    write_atomically(folder / "config.json", lambda file: file.write(text.encode()))
    lines = [
        "import torch",
        f"mean, std = {info['mean']}, {info['std']}",
        f"pixels = torch.rand(2, {channels}, {H}, {W})  # your images, B C H W in 0..1",
        "images = (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]",
        "# timm",
        "import timm",
        f'model = timm.models.VisionTransformer(img_size={(H, W)}, patch_size={(ph, pw)}, '
        f"in_chans={channels}, embed_dim={D}, depth={depth}, num_heads={heads}, "
        f"mlp_ratio={hidden / D:g}, num_classes=0).eval()",
        f'model.load_state_dict(torch.load("{folder}/encoder.pt")["model"])',
        "tokens = model.forward_features(images)  # the class token first",
        "# Hugging Face",
        "from transformers import ViTModel",
        f'model = ViTModel.from_pretrained("{folder}", add_pooling_layer=False).eval()',
        "tokens = model(images).last_hidden_state  # the class token first"]
    text = "\n".join(lines) + "\n"
    write_atomically(folder / "load.py", lambda file: file.write(text.encode()))
    return lines


# ------------------------------------------------------------------------ an encoder out of a file

def load_encoder(path, num_heads=None, network=None, img_size=None):
    """A checkpoint of train.py or extras/, or a file of official MAE or timm weights -> encoder,
    transform.

    encoder: a VisionTransformer in eval mode (B C H W -> B 1+N D). Its `info` has `mean` and `std`
    of training (ImageNet's for others' files), and of a file of ours its `arch`, `config`, `step`.
    transform: PIL image -> its input, C H W. num_heads: for others' files whose heads are not 64
    wide: their shapes do not tell. network: one of NETWORKS; None: what the recipe is judged by,
    the student or RC-MAE's teacher. img_size: another size than it was trained on."""
    file = load_weights(path)
    if is_of_train(file):
        encoder, info = encoder_of_run(path, file, network)
    else:
        if network not in (None, "student"):
            raise UsageError(f"--network {network}: checkpoint {path} has no teachers")
        encoder, info, left_out = encoder_of_others(path, file, num_heads)
        if left_out:
            print(f"not of the encoder, left out: {', '.join(left_out)}", file=sys.stderr)
    encoder.info = info
    if img_size:
        resize_positions(encoder, img_size)
    transform = image_transform(encoder.img_size, encoder.in_chans, info["mean"], info["std"])
    return encoder.eval().requires_grad_(False), transform


def load_network(path, network=None, num_heads=None, img_size=None):
    """One of eval.py's --network in a file -> its encoder, and what the file says of it.

    network: one of NETWORKS, "untrained", "pixels"; None as in `load_encoder`."""
    encoder, _ = load_encoder(path, num_heads, network if network in NETWORKS else None)
    if encoder.in_chans not in (1, 3):
        raise UsageError(f"--checkpoint {path}: takes {encoder.in_chans} channels; data sets here "
                         "have 1 or 3")
    info = dict(encoder.info)
    if network == "untrained":
        if "arch" not in info:
            raise UsageError("--network untrained: needs a checkpoint of train.py; `train.py "
                             "--epochs 0` writes one")
        torch.manual_seed(info["config"]["seed"])          # what a run without --init began with
        encoder = MaskedAutoencoder(**mae_arguments(info["arch"])).encoder.eval()
    info["network"] = network or info["network"]
    if img_size:
        resize_positions(encoder, img_size)
    return encoder, info


def resize_positions(encoder, img_size):
    """Make the encoder take images of another size, an int or (H, W), in place. Between the places
    it knows, the codes of places are interpolated (bicubic, as in MAE's fine-tuning)."""
    (H, W), (ph, pw) = pair(img_size), encoder.patch_size
    if H % ph or W % pw:
        raise UsageError(f"--img-size {H}x{W}: its patches of {ph}x{pw} do not divide it; use "
                         f"{max(1, round(H / ph)) * ph}x{max(1, round(W / pw)) * pw}")
    cls, places = encoder.pos_embed[:, :1], encoder.pos_embed[:, 1:]                     # 1 N D
    places = places.unflatten(1, encoder.grid).permute(0, 3, 1, 2)
    encoder.img_size, encoder.grid = (H, W), (H // ph, W // pw)
    encoder.num_patches = encoder.grid[0] * encoder.grid[1]
    places = F.interpolate(places, encoder.grid, mode="bicubic").flatten(2).mT           # 1 N D
    encoder.pos_embed = torch.nn.Parameter(torch.cat([cls, places], 1), requires_grad=False)


def exported(encoder, mean, std):
    """An encoder with what one must know to use it, as a dictionary of plain data and tensors."""
    return {"model": encoder.state_dict(), "mean": mean, "std": std,
            "num_heads": encoder.blocks[0].attn.num_heads, "img_size": tuple(encoder.img_size)}


def encoder_of_run(path, file, network):
    if network is None:
        network = kept_network(file["config"])
    if NETWORKS[network] not in file:
        there = [name for name, key in NETWORKS.items() if key in file]
        raise UsageError(f"--network {network}: checkpoint {path} has none; it has "
                         f"{', '.join(there) or 'no network of this train.py'}")
    encoder = MaskedAutoencoder(**mae_arguments(file["arch"])).encoder
    prefix = "mae.encoder." if network == "student" else "encoder."
    encoder.load_state_dict({name.removeprefix(prefix): value
                             for name, value in file[NETWORKS[network]].items()
                             if name.startswith(prefix)})
    info = {key: file[key] for key in ("arch", "config", "step", "mean", "std")}
    return encoder, dict(info, network=network)


def mae_arguments(arch):
    """Of the arguments of `Student` those of its MaskedAutoencoder."""
    return {k: v for k, v in arch.items() if k not in ("image_clusters", "patch_clusters")}


EXPORTED = {"model", "mean", "std", "num_heads", "img_size"}       # what a file of `export` holds
# What files of whole models hold beside the encoder: MAE's decoder, a classifier.
NOT_OF_THE_ENCODER = ("decoder_", "mask_token", "head.")


def weights_of(file):
    """The state_dict of a file of others, or of an export."""
    state = file if isinstance(file, dict) else {}
    for key in ("model", "state_dict"):                    # MAE's and timm's training checkpoints
        if isinstance(state.get(key), dict):
            state = state[key]
    return state


def encoder_of_others(path, file, num_heads):
    """Encoder, mean and std of the pixels, names of what is not of the encoder."""
    state = weights_of(file)
    lacking = {"patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight"} - state.keys()
    if lacking:
        raise UsageError(f"--checkpoint {path}: holds no vision transformer in the names of timm "
                         f"or MAE (no {', '.join(sorted(lacking))})")
    exported = EXPORTED <= file.keys()
    if exported:
        num_heads = file["num_heads"]
    arguments = geometry(state, num_heads)
    if exported:                                           # images need not be square
        arguments["img_size"] = tuple(file["img_size"])
    encoder = VisionTransformer(**arguments)
    skipped = [name for name in state if name.startswith(NOT_OF_THE_ENCODER)]
    try:
        fill(encoder, {name: name for name in encoder.state_dict()},
             {name: value for name, value in state.items() if name not in skipped})
    except UsageError as error:
        raise UsageError(f"--checkpoint {path}: {error}. Only plain ViTs fit: one class token, no "
                         "LayerScale, no norm before the blocks, the norm after them") from error
    three = encoder.in_chans == 3
    known = file if exported else {
        "mean": list(IMAGENET_MEAN) if three else [0.5] * encoder.in_chans,
        "std": list(IMAGENET_STD) if three else [0.5] * encoder.in_chans}
    return encoder, {"mean": known["mean"], "std": known["std"], "network": "student"}, skipped


def geometry(state, num_heads=None):
    """Arguments of VisionTransformer read off the shapes of its weights. Square images.

    The number of heads leaves no trace in the shapes: it is D / 64 in all standard ViTs but huge
    (1280 wide, 16 heads)."""
    D, C, *patch = state["patch_embed.proj.weight"].shape
    if num_heads is None:
        num_heads = 16 if D == 1280 else max(1, D // 64)
        print(f"the file does not say how many heads there are: taken as {num_heads}",
              file=sys.stderr)
    if num_heads < 1 or D % num_heads:
        raise UsageError(f"--num-heads {num_heads}: must divide the width of {D}")
    side = math.isqrt(state["pos_embed"].shape[1] - 1)
    block_numbers = [int(name.split(".")[1]) for name in state if name.startswith("blocks.")]
    return {"img_size": (side * patch[0], side * patch[1]), "patch_size": tuple(patch),
            "in_chans": C, "embed_dim": D, "depth": 1 + max(block_numbers), "num_heads": num_heads,
            "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / D}
