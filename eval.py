"""How good is an encoder? Frozen features, computed once, and a simple classifier on top.

    python eval.py knn    --checkpoint runs/pl-mae-shapes-micro/checkpoint.pt
    python eval.py linear --checkpoint runs/mae-shapes-micro/checkpoint.pt --data cifar10 --data-root data
    python eval.py diagnose --checkpoint runs/pl-mae-shapes-micro/checkpoint.pt

`knn` asks whether images of a class lie together; `linear` whether a plane separates them. For a masked autoencoder the
second answer is much the better one, and which token is asked matters: both are reported, the class token and the mean
of the patch tokens. `top1` (a fraction, on the test split) is that of the token that was better on validation images cut
from the training data. `diagnose` looks at features and pseudo labels of those validation images: have they collapsed, do
labels agree with classes? --network chooses the student or a teacher. The last line printed is a JSON object, appended to
eval.jsonl beside the checkpoint.
"""

import json
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from checkpoint import append_json, load_checkpoint
from data import SETS, held_out, load_images, read
from extras.command_line import Parser, UsageError, find_device, run_main
from extras.matching import matched_accuracy, nmi
from extras.weights import ENCODER_ARGUMENTS, NETWORKS
from mae import VisionTransformer, load_encoder
from pseudo_labels import Student, count_labels, health, make_labels
from teachers import make_teacher

LINEAR_RATES = (0.003, 0.03, 0.3, 3.0)     # learning rates tried, a wide net; validation images choose


@torch.no_grad()
def features(encoder, images, ids, mean, std, device, batch=500):
    """Features of the images at ids, on the CPU: {"class": n D, "mean": n D}; {"pixels": n (C H W)} if encoder is None."""
    mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (mean, std))
    columns = {}
    for part in ids.split(batch):
        x = (read(images, part).to(device).float() / 255 - mean) / std                                  # b C H W
        if encoder is None:
            tokens = {"pixels": x.flatten(1)}
        else:
            x = encoder.encode(x.to(next(encoder.parameters()).dtype)).float()                          # b 1+N D
            tokens = {"class": x[:, 0], "mean": x[:, 1:].mean(1)}
        for name, value in tokens.items():
            columns.setdefault(name, []).append(value.cpu())
    return {name: torch.cat(value) for name, value in columns.items()}


def knn(x, y, test_x, classes, k=20, temperature=0.07):
    """Weighted k nearest neighbours by cosine similarity: x n D, y n, test_x m D -> predicted classes m.

    A neighbour votes with exp(similarity / temperature); k and temperature as in Wu et al. 2018 and DINO."""
    x, test_x = F.normalize(x, dim=1), F.normalize(test_x, dim=1)
    predictions = []
    for queries in test_x.split(1000):
        similarity, neighbours = (queries @ x.T).topk(min(k, len(x)), dim=1)                            # b k
        votes = torch.zeros(len(queries), classes, device=x.device)
        votes.scatter_add_(1, y[neighbours], (similarity / temperature).exp())                          # b classes
        predictions.append(votes.argmax(1))
    return torch.cat(predictions)


def linear(x, y, test_x, classes, rates=LINEAR_RATES, epochs=90, batch=1024, seed=0):
    """Linear classifiers, one per learning rate, trained side by side: x n D, y n, test_x m D -> predictions rates m.

    MAE's protocol: BatchNorm without affine, then a linear layer; momentum 0.9, no weight decay, cosine, 90 epochs. SGD in
    place of LARS, as batches are small. The rate is for the whole batch."""
    g = torch.Generator().manual_seed(seed)
    norm = nn.BatchNorm1d(x.shape[1], affine=False, device=x.device)
    heads = [nn.Linear(x.shape[1], classes, device=x.device) for _ in rates]
    for head in heads:
        nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
    optimizer = torch.optim.SGD([dict(params=h.parameters(), lr=r) for h, r in zip(heads, rates)], momentum=0.9)
    batch = min(batch, len(x))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * (len(x) // batch))
    for _ in range(epochs):
        order = torch.randperm(len(x), generator=g)
        for ids in order[:len(x) // batch * batch].view(-1, batch).to(x.device):
            inputs = norm(x[ids])
            loss = sum(F.cross_entropy(head(inputs), y[ids]) for head in heads)   # no weight is shared: each gets its own
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    norm.eval()
    with torch.no_grad():
        return torch.stack([head(norm(test_x)).argmax(1) for head in heads])


def accuracy(predictions, y):
    return round((predictions == y).float().mean().item(), 4)


def classify(task, x, y, fit, val, test_x, test_y, classes):
    """Validation and test accuracy of one token: tuned on rows `fit` against rows `val`, then trained on all rows."""
    if task == "knn":
        return accuracy(knn(x[fit], y[fit], x[val], classes), y[val]), accuracy(knn(x, y, test_x, classes), test_y)
    scores = [accuracy(p, y[val]) for p in linear(x[fit], y[fit], x[val], classes)]
    best = max(range(len(scores)), key=scores.__getitem__)
    return scores[best], accuracy(linear(x, y, test_x, classes, rates=LINEAR_RATES[best:best + 1])[0], test_y)


def subset(ids, n):
    """At most n of ids, evenly spread."""
    return ids[torch.linspace(0, len(ids) - 1, min(n, len(ids))).long()]


def monitor(encoder, images, train_ids, val_ids, mean, std, device):
    """While training runs, on held-out images: {"knn_class", "knn_mean", "effective_rank_class", "effective_rank_mean"}; {} without labels.

    At most 10,000 labelled images to compare with and 2,000 to test: a curve, quickly. `python eval.py knn` uses all."""
    train_ids = train_ids[images.labels[train_ids] >= 0]
    if len(val_ids) == 0 or len(train_ids) == 0:
        return {}
    train_ids, val_ids = subset(train_ids, 10_000), subset(val_ids, 2_000)
    x, test_x = (features(encoder, images, ids, mean, std, device) for ids in (train_ids, val_ids))
    y, test_y = images.labels[train_ids], images.labels[val_ids]
    return ({f"knn_{token}": accuracy(knn(x[token], y, test_x[token], len(images.classes)), test_y) for token in x}
            | {f"effective_rank_{token}": effective_rank(v.float()) for token, v in test_x.items()})


def load_network(options):
    """--checkpoint and --network: the encoder of the student, of a teacher, or a new one, and what the file says of it."""
    named = options.network if options.network in NETWORKS else None
    encoder, _ = load_encoder(options.checkpoint, options.num_heads, named)
    if encoder.in_chans not in (1, 3):
        raise UsageError(f"--checkpoint {options.checkpoint}: takes {encoder.in_chans} channels; data sets here have 1 or 3")
    info = encoder.info
    if options.network == "untrained":
        if "arch" not in info:
            raise UsageError("--network untrained: needs a checkpoint of train.py; `train.py --epochs 0` writes one")
        torch.manual_seed(info["config"]["seed"])           # the very weights that the run began with
        encoder = VisionTransformer(**{k: info["arch"][k] for k in ENCODER_ARGUMENTS}).eval()
    return encoder, dict(info, network=options.network or info["network"])


# ------------------------------------------------------------------------------------------------------------- diagnosis

def load_run(path):
    """A checkpoint of train.py -> student, {"labelling": teacher, "reconstruction": teacher} as far as the run had them, config
    (a namespace, with mean and std), centres."""
    file = load_checkpoint(path)
    if not isinstance(file, dict) or "arch" not in file or "centres" not in file:
        raise UsageError(f"--checkpoint {path}: is not of train.py, so it has no teachers and no labels; use knn or linear")
    student, teachers = Student(**file["arch"]), {}
    student.load_state_dict(file["model"])
    for name in ("labelling", "reconstruction"):
        if f"{name}_teacher" in file:
            weights = file[f"{name}_teacher"]
            parts = {key.split(".")[0] for key in weights}
            teachers[name] = make_teacher(student, without={key.split(".")[0] for key in file["model"]} - parts)
            teachers[name].load_state_dict(weights)
    return student.eval().requires_grad_(False), teachers, SimpleNamespace(**file["config"], mean=file["mean"], std=file["std"]), file["centres"]


def effective_rank(x):
    """exp of the entropy of the normalised singular values of centred features n D: 1 to D, how many directions are in use
    (RankMe, Garrido et al. 2023, who do not centre)."""
    s = torch.linalg.svdvals(x - x.mean(0))
    p = s / s.sum().clamp(min=1e-12)
    return round(torch.special.xlogy(p, p).sum().neg().exp().item(), 2)


def spread(x):
    """Standard deviation of L2-normalised features n D, mean over D, times sqrt(D): 0 if all are alike, 1 if they point
    everywhere (SimSiam)."""
    return round(F.normalize(x, dim=1).std(0, unbiased=False).mean().item() * x.shape[1] ** 0.5, 4)


@torch.no_grad()
def diagnose(path, network, images, ids, mean, std, device):
    """The state of features and pseudo labels on the images at ids, as a dictionary; figures of labels are in nats."""
    student, teachers, config, centres = load_run(path)
    student, centres = student.to(device), {name: c.to(device) for name, c in centres.items()}
    x = ((read(images, ids).to(device).float() / 255 - torch.tensor(mean, device=device)[:, None, None])
         / torch.tensor(std, device=device)[:, None, None]).to(student.cls_token.dtype)                 # n C H W
    encode = lambda encoder: torch.cat([encoder.to(device).encode(part) for part in x.split(200)])      # n 1+N D
    tokens = {name: encode(t) for name, t in dict(student=student, **{f"{k}-teacher": t for k, t in teachers.items()}).items()}
    views = lambda u: {"class": u[:, 0].float(), "mean": u[:, 1:].mean(1).float()}
    found = {}
    for token, v in views(tokens[network]).items():
        found |= {f"effective_rank_{token}": effective_rank(v), f"spread_{token}": spread(v)}
    for name in list(tokens)[1:]:                          # how far a teacher is from its student, image by image
        for token, v in views(tokens["student"]).items():
            w = views(tokens[name])[token]
            found[f"student_vs_{name}_{token}"] = round(F.cosine_similarity(v - v.mean(0), w - w.mean(0), dim=1).mean().item(), 4)
    if "labelling" in teachers:
        by = (config.balancing, config.teacher_temperature)
        labels, own = (make_labels(t, tokens[n], *by, {k: c.clone() for k, c in centres.items()})
                       for t, n in ((teachers["labelling"], "labelling-teacher"), (student, "student")))
        y = images.labels[ids]
        for name, q in labels.items():
            hard = q.argmax(-1).cpu()                                                                   # n (N)
            found |= {f"{name}_ln_k": round(math.log(q.shape[-1]), 4)} | {
                f"{name}_{k}": round(v, 4) for k, v in health(count_labels(q)).items()}
            found[f"{name}_student_agrees"] = round((own[name].argmax(-1).cpu() == hard).float().mean().item(), 4)
            if name == "data":                             # labels that only say where a patch is could be predicted blindly
                found["data_nmi_position"] = round(nmi(hard.flatten(), torch.arange(hard.shape[1]).repeat(len(hard))), 4)
                hard, classes = hard.flatten(), y[:, None].expand_as(hard).flatten()
            else:
                classes = y
            if (y >= 0).all():
                chance = classes[torch.randperm(len(classes), generator=torch.Generator().manual_seed(0))]
                found |= {f"{name}_nmi": round(nmi(hard, classes), 4), f"{name}_nmi_shuffled": round(nmi(hard, chance), 4),
                          f"{name}_matched_accuracy": round(matched_accuracy(hard, classes), 4)}
    return found


# ------------------------------------------------------------------------------------------------------------ the command

def main(argv=None):
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("task", choices=["knn", "linear", "diagnose"])
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="of train.py, of the official MAE code or timm")
    parser.add_argument("--network", choices=[*NETWORKS, "untrained", "pixels"], help="untrained: the same encoder with random "
                        "weights; pixels: no encoder (default: student; of rc-mae its teacher)")
    parser.add_argument("--token", choices=["class", "mean"], help="default: the better one on validation images")
    parser.add_argument("--data", choices=SETS, help="default: what the checkpoint was trained on")
    parser.add_argument("--data-root", metavar="DIR", help="default: that of the training run; for another set than its own: data")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, ... (default: auto)")
    parser.add_argument("--num-heads", type=int, help="for others' weights whose heads are not 64 wide")
    options = parser.parse_args(argv)
    start = time.perf_counter()

    device = find_device(options.device)
    if options.network == "pixels" and options.token:
        raise UsageError(f"--token {options.token}: raw pixels have no tokens; leave it out")
    encoder, info = load_network(options)
    config = info.get("config", {})
    data = options.data or config.get("data")
    if data is None:
        raise UsageError("--data: this checkpoint does not name a data set; name one")
    root = options.data_root or (config["data_root"] if data == config.get("data") else "data")
    if data == "imagefolder" and data != config.get("data") and not options.data_root:
        raise UsageError("--data-root: name the folder of the images")
    if options.task == "diagnose":
        if options.network in ("untrained", "pixels"):
            raise UsageError(f"--network {options.network}: has no labels and no teachers; name {', '.join(NETWORKS)}")
        images = load_images(data, root, "train", encoder.img_size, encoder.in_chans)
        train_ids, ids = held_out(images, config.get("val_fraction", 0.1) if data == config.get("data") else 0.1)
        ids = subset(ids if len(ids) else train_ids, 2000)
        return report(options, dict(task="diagnose", network=info["network"], data=data, images=len(ids), step=info.get("step"),
                                    **diagnose(options.checkpoint, info["network"], images, ids, info["mean"], info["std"], device)), start)
    train, test = (load_images(data, root, split, encoder.img_size, encoder.in_chans) for split in ("train", "test"))
    if not train.classes:
        raise UsageError(f"--data-root {root}: the training images have no labels; use ROOT/train/<class>/*")
    if train.classes != test.classes:
        raise UsageError(f"--data-root {root}: {len(train.classes)} classes to train on and {len(test.classes)} to test on, "
                         f"different: {', '.join(sorted(set(train.classes) ^ set(test.classes))[:5])}")
    network = None if options.network == "pixels" else encoder.to(device)
    ids = torch.nonzero(train.labels >= 0).flatten()
    if len(ids) < 10:
        raise UsageError(f"--data-root {root}: {len(ids)} labelled training images; at least 10 are needed, one to validate on")
    x, test_x = (features(network, images, i, info["mean"], info["std"], device)
                 for images, i in ((train, ids), (test, torch.arange(len(test)))))
    y, test_y = train.labels[ids].to(device), test.labels.to(device)
    _, val_ids = held_out(train, 0.1)                      # the images that train.py holds out by default
    val = torch.isin(ids, val_ids).to(device)

    scores = {token: classify(options.task, x[token].to(device), y, ~val, val, test_x[token].to(device),
                              test_y, len(train.classes)) for token in x}
    token = options.token or max(scores, key=lambda t: scores[t][0])       # by validation alone: [1] is the test split
    if not options.token and len(scores) > 1:
        print(f"reported: the {token} token, better on validation images; guessing gives {1 / len(train.classes):.1%}", file=sys.stderr)
    record = dict(task=options.task, top1=scores[token][1], token=token,
                  tokens={t: s[1] for t, s in scores.items()}, validation={t: s[0] for t, s in scores.items()},
                  network=info["network"], data=data, step=info.get("step"), images=len(ids), test_images=len(test))
    report(options, record, start)


def report(options, record, start):
    record |= dict(checkpoint=options.checkpoint, seconds=round(time.perf_counter() - start, 1))
    append_json(Path(options.checkpoint).parent / "eval.jsonl", record)
    print(json.dumps(record))


if __name__ == "__main__":
    run_main(main)
