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

from mae import VisionTransformer, pair
from support.checkpoint import is_of_train, load_checkpoint, new_student, save_checkpoint
from support.command_line import UsageError, flag, make_folder, numbers, say
from support.files import write_atomically
from support.images import IMAGENET_MEAN, IMAGENET_STD, image_transform
from support.settings import kept_network

try:
    from safetensors.torch import load_file, save
except ImportError:
    load_file = save = None

NETWORKS = {"student": "student", "labelling-teacher": "labelling_teacher",
            "reconstruction-teacher": "reconstruction_teacher"}        # name: key in the file
# What others' files do not say, as arguments of `load_encoder` and flags of all that read such
# files: type of the flag, help.
ASSUMED = {
    "num_heads": (int, "heads of others' weights, where they are not 64 wide"),
    "pixel_mean": (numbers, "mean of the pixels that others' weights are used to, 0.5 or "
                   "0.5,0.5,0.5 (default: ImageNet's)"),
    "pixel_std": (numbers, "their standard deviation, likewise"),
}


def given(settings):
    """What flags say of others' files: {name of ASSUMED: value, None where nothing was said}."""
    return {name: getattr(settings, name) for name in ASSUMED}


def load_weights(path, name="--checkpoint"):
    """`load_checkpoint`, or a .safetensors; of what extras/ trained further, the encoder alone
    (`exported`)."""
    if Path(path).suffix.lower() == ".safetensors" and Path(path).is_file():
        if load_file is None:
            raise UsageError(f"{name} {path}: to read it, pip install safetensors")
        try:
            return load_file(path)
        except Exception as error:
            raise UsageError(f"{name} {path}: no file of safetensors that can be read ({error}); "
                             "use another one") from error
    file = load_checkpoint(path, name)
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


def fill(module, names, state):
    """Load state (a file's names) into the module; names: {the file's name: the module's name}.
    Raises UsageError where one has what the other lacks, or where shapes differ."""
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


def start_from(student, config):
    """--init: copy the encoder of a file into a new student, and its decoder if it has one that
    predicts the same target -> mean and std of the pixels that these weights are used to.

    The file: a checkpoint of train.py (its student), official MAE weights, timm's, or an export;
    what it does not say the config does. The heads of the pseudo labels stay new. Codes of places
    are interpolated if images have another size there. Raises UsageError for a file that is none,
    or of another network."""
    path, target, assumed = config.init, config.target, given(config)
    file, own = load_weights(path, "--init"), sizes(student.mae.encoder)
    try:
        if is_of_train(file):
            say_what_is_known(path, assumed | {"num_heads": None})     # train.py has that flag too
            encoder, info = encoder_of_run(path, file, "student")
        else:
            encoder, info, _ = encoder_of_others(path, file, assumed, own["heads"])
    except UsageError as error:
        raise UsageError(str(error).replace("--checkpoint", "--init")) from error
    if encoder.patch_size == student.mae.encoder.patch_size:
        resize_positions(encoder, own["img_size"])
    theirs = sizes(encoder)
    if theirs != own:
        differ = ", ".join(f"{name} {theirs[name]} there, {own[name]} here" for name in own
                           if theirs[name] != own[name])
        raise UsageError(f"--init {path}: another network, {differ}; make them alike with --model, "
                         "--patch-size and --num-heads")
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
            state = {name: value for name, value in state.items() if name in names}
            check_numbers(path, state)
            fill(student.mae.decoder, names, state)
            taken += " and decoder"
        except UsageError as error:
            say(f"--init {path}: its decoder does not fit, {error}")
    say(f"starts from {path}: {taken}, and the mean and std of pixels that it is used to")
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
    config.json, preprocessor_config.json, model.safetensors (where that package is installed, else
                     pytorch_model.bin)     a ViTModel of Hugging Face, and how it wants images
    load.py          the lines, for this folder wherever it is"""
    require_plain(encoder, "export")
    folder = Path(folder)
    make_folder(folder, "--out")
    (H, W), (ph, pw), channels, D, depth, heads, hidden = sizes(encoder).values()
    state = {name: value.cpu() for name, value in encoder.state_dict().items()}
    content = exported(encoder, info["mean"], info["std"]) | {"model": state}
    save_checkpoint(folder / "encoder.pt", content)
    named = {name: value.contiguous() for name, value in to_hugging_face(state).items()}
    old, new = folder / "pytorch_model.bin", folder / "model.safetensors"
    if save is None:
        old, new = new, old
        save_checkpoint(new, named)
    else:
        write_atomically(new, lambda file: file.write(save(named, {"format": "pt"})))
    old.unlink(missing_ok=True)                            # of an export before: one of both counts
    size, patch = H if H == W else [H, W], ph if ph == pw else [ph, pw]
    config = {"architectures": ["ViTModel"], "model_type": "vit", "image_size": size,
              "patch_size": patch, "num_channels": channels, "hidden_size": D,
              "num_hidden_layers": depth, "num_attention_heads": heads, "intermediate_size": hidden,
              "hidden_act": "gelu", "layer_norm_eps": 1e-6, "qkv_bias": True}
    for name, content in (("config.json", config),
                          ("preprocessor_config.json", preprocessor(H, W, channels, info))):
        text = json.dumps(content, indent=2) + "\n"
        write_atomically(folder / name, lambda file: file.write(text.encode()))
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
        "model.load_state_dict(torch.load(folder + '/encoder.pt')['model'])",
        "tokens = model.forward_features(images)  # the class token first",
        "# Hugging Face",
        "from transformers import AutoImageProcessor, AutoModel",
        "prepare = AutoImageProcessor.from_pretrained(folder)  # of pictures of Pillow",
        "model = AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()",
        "tokens = model(images).last_hidden_state  # the class token first"]
    here = ["from pathlib import Path", "folder = str(Path(__file__).parent)"]
    text = "\n".join(here + lines) + "\n"
    write_atomically(folder / "load.py", lambda file: file.write(text.encode()))
    return [f"folder = {str(folder)!r}", *lines]


def preprocessor(H, W, channels, info):
    """How Hugging Face prepares images: as `image_transform`, the centre of the shape H W. Where
    that is not square it has no such way: the whole image is stretched to it."""
    square = {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": H},
              "do_center_crop": True, "crop_size": {"height": H, "width": W}}
    other = {"image_processor_type": "ViTImageProcessor", "size": {"height": H, "width": W}}
    return (square if H == W else other) | {
        "do_resize": True, "resample": 3, "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": info["mean"], "image_std": info["std"],
        "do_convert_rgb": channels == 3}


# ------------------------------------------------------------------------ an encoder out of a file

def load_encoder(path, num_heads=None, network=None, img_size=None, pixel_mean=None,
                 pixel_std=None):
    """A checkpoint of train.py or extras/, or a file of official MAE or timm weights -> encoder,
    transform.

    encoder: a VisionTransformer in eval mode (B C H W -> B 1+N D). Its `info` has `mean` and `std`
    of training, and of a file of ours its `arch`, `config`, `step`. transform: PIL image -> its
    input, C H W. num_heads, pixel_mean, pixel_std (a list of one number or of one for each channel,
    in units of 0..1): what others' files do not say; None: what is usual, and that is printed.
    network: one of NETWORKS; None: what the recipe is judged by, the student or RC-MAE's teacher.
    img_size: another size than it was trained on."""
    assumed = dict(zip(ASSUMED, (num_heads, pixel_mean, pixel_std)))
    file = load_weights(path)
    if is_of_train(file):
        say_what_is_known(path, assumed)
        encoder, info = encoder_of_run(path, file, network)
    else:
        if network not in (None, "student"):
            raise UsageError(f"--network {network}: checkpoint {path} has no teachers")
        encoder, info, left_out = encoder_of_others(path, file, assumed)
        if left_out:
            print(f"not of the encoder, left out: {', '.join(left_out)}", file=sys.stderr)
    encoder.info = info
    if img_size:
        resize_positions(encoder, img_size)
    transform = image_transform(encoder.img_size, encoder.in_chans, info["mean"], info["std"])
    return encoder.eval().requires_grad_(False), transform


def load_network(path, network=None, img_size=None, **assumed):
    """One of eval.py's --network in a file -> its encoder, and what the file says of it.

    network: one of NETWORKS, "untrained", "pixels"; None, and the others, as in `load_encoder`."""
    encoder, _ = load_encoder(path, network=network if network in NETWORKS else None, **assumed)
    if encoder.in_chans not in (1, 3):
        raise UsageError(f"--checkpoint {path}: takes {encoder.in_chans} channels; data sets here "
                         "have 1 or 3")
    info = dict(encoder.info)
    if network == "untrained":
        if "arch" not in info:
            raise UsageError("--network untrained: needs a checkpoint of train.py; `train.py "
                             "--epochs 0` writes one")
        torch.manual_seed(info["config"]["seed"])          # what a run without --init began with
        encoder = new_student(info["arch"], info["config"]["recipe"]).mae.encoder.eval()
    info["network"] = network or info["network"]
    if img_size:
        resize_positions(encoder, img_size)
    return encoder, info


def require_plain(encoder, what):
    """Raises UsageError for an encoder that is no VisionTransformer: GreenMIM's."""
    if not isinstance(encoder, VisionTransformer):
        raise UsageError(f"{what}: only plain vision transformers can do that; use the checkpoint "
                         "of another recipe")


def resize_positions(encoder, img_size):
    """Make the encoder take images of another size, an int or (H, W), in place. Between the places
    it knows, the codes of places are interpolated (bicubic, as in MAE's fine-tuning)."""
    if pair(img_size) == tuple(encoder.img_size):
        return
    require_plain(encoder, f"--img-size {img_size}")
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
    try:
        if network is None:
            network = kept_network(file["config"])
        if NETWORKS[network] not in file:
            there = [name for name, key in NETWORKS.items() if key in file]
            raise UsageError(f"--network {network}: checkpoint {path} has none; it has "
                             f"{', '.join(there) or 'no network of this train.py'}")
        encoder = new_student(file["arch"], file["config"]["recipe"]).mae.encoder
        prefix = "mae.encoder." if network == "student" else "encoder."
        state = {name.removeprefix(prefix): value for name, value in file[NETWORKS[network]].items()
                 if name.startswith(prefix)}
        check_numbers(path, state)
        encoder.load_state_dict(state)
        info = {key: file[key] for key in ("arch", "config", "step", "mean", "std")}
    except UsageError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise UsageError(f"--checkpoint {path}: is not as this train.py writes it "
                         f"({type(error).__name__}: {str(error).splitlines()[0]}); use the "
                         "version that wrote it, or another file") from error
    return encoder, dict(info, network=network)


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


def say_what_is_known(path, assumed):
    """Of a file that says by itself what others' do not: that flags say nothing more."""
    flags = [flag(name) for name, value in assumed.items() if value is not None]
    if flags:
        say(f"{', '.join(flags)}: ignored, as {path} says itself how it was trained")


def check_numbers(path, state):
    """Raises UsageError for what cannot be weights: no tensors, whole numbers, NaN."""
    for name, value in state.items():
        if not isinstance(value, torch.Tensor) or value.is_meta or value.layout != torch.strided:
            wrong = "is no plain tensor"
        elif not value.is_floating_point():
            wrong = f"holds {str(value.dtype).removeprefix('torch.')}, not fractions"
        elif not value.float().isfinite().all():
            wrong = "holds numbers that are not finite"
        else:
            continue
        raise UsageError(f"--checkpoint {path}: {name} {wrong}; use weights in fp32, fp16 or bf16")


def encoder_of_others(path, file, assumed, heads=None):
    """Encoder, mean and std of the pixels, names of what is not of the encoder.

    assumed: {name of ASSUMED: value}, None for what is usual; that is printed. heads: what is usual
    here, if that is known."""
    state = {str(name): value for name, value in weights_of(file).items()}
    lacking = {"patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight"} - state.keys()
    if lacking:
        raise UsageError(f"--checkpoint {path}: holds no vision transformer in the names of timm "
                         f"or MAE (no {', '.join(sorted(lacking))})")
    skipped = [name for name in state if name.startswith(NOT_OF_THE_ENCODER)]
    weights = {name: value for name, value in state.items() if name not in skipped}
    check_numbers(path, weights)
    says_itself = EXPORTED <= file.keys()
    if says_itself:
        say_what_is_known(path, assumed if heads is None else assumed | {"num_heads": None})
        assumed = {"num_heads": file["num_heads"], "pixel_mean": file["mean"],
                   "pixel_std": file["std"]}
    try:
        if assumed["num_heads"] is not None:
            heads = assumed["num_heads"]
        arguments = geometry(weights, heads)
        if says_itself:                                    # images need not be square
            arguments["img_size"] = tuple(file["img_size"])
        mean, std = pixel_statistics(assumed, arguments["in_chans"])
        encoder = VisionTransformer(**arguments)
    except UsageError as error:
        raise UsageError(f"{error} (--checkpoint {path})") from error
    try:
        fill(encoder, {name: name for name in encoder.state_dict()}, weights)
    except UsageError as error:
        raise UsageError(f"--checkpoint {path}: {error}. Only plain ViTs fit: one class token, no "
                         "LayerScale, no norm before the blocks, the norm after them") from error
    usual = {"num_heads": f"{arguments['num_heads']} heads", "pixel_mean": f"pixels of mean {mean}",
             "pixel_std": f"std {std} of the pixels"}
    parts = [f"{text} ({flag(name)})" for name, text in usual.items()
             if assumed[name] is None]
    if parts:
        H, W = arguments["img_size"]
        say(f"{path} does not say how it was trained; taken as {', '.join(parts)}, square images "
            f"({H} x {W})")
    return encoder, {"mean": mean, "std": std, "network": "student"}, skipped


def pixel_statistics(assumed, channels):
    """Mean and std of each channel: those given, or ImageNet's, or, of other than three channels,
    0.5. Raises UsageError for numbers that cannot be."""
    usual = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else ((0.5,) * channels,) * 2
    found = []
    for name, low, values in zip(("pixel_mean", "pixel_std"), (0, 1e-3), usual):
        these = list(values if assumed[name] is None else assumed[name])
        these = these * channels if len(these) == 1 else these
        if len(these) != channels or not all(low <= value <= 1 for value in these):
            raise UsageError(f"{flag(name)} {','.join(map(str, these))}: give one number from "
                             f"{low} to 1, or {channels}, one for each channel")
        found.append(these)
    return found


def geometry(state, num_heads=None):
    """Arguments of VisionTransformer read off the shapes of its weights. Square images.

    The number of heads leaves no trace in the shapes: it is D / 64 in all standard ViTs but huge
    (1280 wide, 16 heads)."""
    if state["patch_embed.proj.weight"].ndim != 4 or state["pos_embed"].ndim != 3:
        raise UsageError("weights of another geometry: patch_embed.proj.weight and pos_embed have "
                         "other numbers of axes than in a vision transformer; use another file")
    D, C, *patch = state["patch_embed.proj.weight"].shape
    if num_heads is None:
        num_heads = 16 if D == 1280 else max(1, D // 64)
    if num_heads < 1 or D % num_heads:
        raise UsageError(f"--num-heads {num_heads}: must divide the width of {D}")
    side = math.isqrt(state["pos_embed"].shape[1] - 1)
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    return {"img_size": (side * patch[0], side * patch[1]), "patch_size": tuple(patch),
            "in_chans": C, "embed_dim": D, "depth": depth, "num_heads": num_heads,
            "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / D}
