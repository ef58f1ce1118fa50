"""The kinds of random cases that are about files, flags and schedules: see random_cases.py."""

import io
import json
import math
import os
import tempfile
import warnings
from contextlib import redirect_stderr
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import mae
import teachers
import train
from support import datasets, images, masks, settings
from support.command_line import UsageError, what_ran_out

NAMES = ("a", "b", "B", "ü", "u\u0308", "日本", "two words", ".hidden", "__MACOSX", "line\nbreak",
         "%s", "train", "test", "-x", os.fsdecode(b"\xff"))
SUFFIXES = (".png", ".png", ".JPG", ".webp", ".tif", ".txt", "", ".png.part", ".mpg")
JUNK = (None, "", " ", "a\nb", "x" * 5000, "\ud800", -1, 0, 1, 2**63, 1.5, math.nan, math.inf, True,
        [], {}, "../b", "a\\b")


def attempt(action, *args):
    """(what it gives, None); or (None, the line) where it refuses."""
    said, result, line = io.StringIO(), None, None
    try:
        with redirect_stderr(said), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = action(*args)
    except UsageError as error:
        line = str(error)
    except SystemExit as stop:                             # of argparse
        line = said.getvalue().removesuffix("\n")
        assert stop.code == 2
    except OSError as error:
        line = what_ran_out(error)
        if line is None:
            raise
    if line is not None:
        assert len(line.splitlines()) == 1, line
        assert "--" in line or "/" in line, line           # it names a flag or a file,
        assert not line.endswith((" ", ":")), line         # and a remedy is no empty list
    return result, line


def tree(rng, base, links_to):
    """A random tree of files, folders and links under base."""
    here = [base]
    for _ in range(rng.randint(0, 14)):
        path = rng.choice(here) / (rng.choice(NAMES) + rng.choice(SUFFIXES))
        what = rng.choice(["file", "file", "file", "folder", "folder", "link", "pipe"])
        if os.path.lexists(path):
            continue
        if what == "folder":
            path.mkdir()
            here.append(path)
        elif what == "link":
            path.symlink_to(rng.choice([*sorted(base.rglob("*")), *here, *links_to, "nowhere"]))
        elif what == "pipe":
            os.mkfifo(path)
        else:
            path.write_bytes(b"x" * (rng.random() > 0.02))


def walks(rng, g):
    with tempfile.TemporaryDirectory() as root:
        root, other = Path(root) / "set", Path(root) / "other"
        root.mkdir(), other.mkdir()
        tree(rng, other, [])
        tree(rng, root, [other, root.parent, *sorted(other.rglob("*"))])
        for _ in range(rng.choice([0, 1, 2])):             # classes
            folder = root / "train" / rng.choice(NAMES)
            try:
                folder.mkdir(parents=True)
            except OSError:                                # something of this name is there
                continue
            tree(rng, folder, [other])
        for split in ("train", "test"):
            attempt(datasets.load_images, "imagefolder", root, split, 8, 3, 0)
        walked, line = attempt(datasets.walk, root)
        if walked is None:
            assert "0 bytes" in line
            return
        known = [*walked.paths, *walked.folders, *sum(walked.left_out.values(), [])]
        there = [each for folder in (root, *walked.folders) for each in folder.iterdir()]
        assert sorted(known) == sorted(there) and walked.paths == sorted(walked.paths)
        files = [os.path.realpath(path) for path in walked.paths]
        assert len({*files}) == len(files)
        for folder, below, names in os.walk(root):
            below[:] = [name for name in below if not datasets.hidden(name)]
            for path in (Path(folder) / name for name in names if not datasets.hidden(name)):
                if path.is_file() and path.suffix.lower() in images.suffixes():
                    assert os.path.realpath(path) in files, path


def annotations(rng, g):
    """A file in the format of COCO, most often with something spoiled."""
    ids, kinds = (rng.sample([*range(20), 2**53, -3], rng.randint(1, 6)) for _ in range(2))
    content = {
        "images": [{"id": i, "file_name": f"{rng.choice(['', 'sub/', 'ü '])}{i}.png"} for i in ids],
        "categories": [{"id": k, "name": rng.choice(NAMES[:5])} for k in kinds],
        "annotations": [{"image_id": rng.choice(ids), "category_id": rng.choice(kinds), "id": j}
                        for j in range(rng.randint(0, 8))]}
    want = torch.zeros(len(ids), len(kinds), dtype=torch.uint8)
    for each in content["annotations"]:
        want[ids.index(each["image_id"]), sorted(kinds).index(each["category_id"])] = 1
    with tempfile.TemporaryDirectory() as root:
        root = Path(root)
        (root / "annotations").mkdir()
        for each in content["images"]:
            path = root / "train2017" / each["file_name"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x")
        spoil = rng.choice(["nothing", "field", "field", "list", "bytes"])
        rows = rng.choice([each for each in content.values() if each])
        row = rng.randrange(len(rows))
        if spoil == "field":
            rows[row][rng.choice([*rows[row]])] = rng.choice([*JUNK, "another.png"])
        elif spoil == "list":
            rng.choice([lambda: rows.__setitem__(row, rng.choice(JUNK)), lambda: rows.pop(row),
                        lambda: rows.append(dict(rows[row])), lambda: rows[row].popitem(),
                        lambda: content.__setitem__("images", rng.choice(JUNK))])()
        raw = json.dumps(content, ensure_ascii=rng.random() < 0.9 or spoil != "nothing")
        raw = bytearray(raw.encode(rng.choice(["utf-8", "utf-8-sig", "utf-16"])))
        if spoil == "bytes":
            raw[rng.randrange(len(raw)):] = rng.choice([b"", b"\xff", b"[" * 10**5, b"\n\0"])
        (root / "annotations/instances_train2017.json").write_bytes(raw)
        found, line = attempt(datasets.load_images, "coco", root, "train", 8, 3, 0)
        assert found is not None or spoil != "nothing", line
        if spoil == "nothing":
            assert torch.equal(found.targets["multilabel"], want)
        if found is not None:
            assert all(path.is_file() for path in found.paths)
            assert found.targets["multilabel"].shape == (len(found), len(found.classes))


def mask_files(rng, g):
    """An image and its mask, of any mode and format that Pillow writes, whole or cut."""
    modes = ("1", "L", "P", "I", "I;16", "F", "LA", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
    W, H = rng.randint(1, 12), rng.randint(1, 12)
    numbers = np.array([[rng.randrange(rng.choice([2, 9, 256])) for _ in range(W)]
                        for _ in range(H)])
    mask = Image.fromarray(numbers.astype(np.uint8))
    mode = rng.choice(modes)
    if mode in ("P", "I", "I;16", "1"):
        mask = Image.fromarray(numbers > 0) if mode == "1" else mask.convert(mode)
        if mode == "P":
            mask.putpalette([rng.randrange(256) for _ in range(768)])
            mask.putdata(numbers.flatten().tolist())
    else:
        mask = mask.convert(mode)
    with tempfile.TemporaryDirectory() as root:
        path = Path(root) / "train" / "1.jpg"
        file = masks.mask_path(path)
        path.parent.mkdir(), file.parent.mkdir()
        exif, turn = Image.Exif(), rng.choice([1, 6, 8, 99])
        exif[images.ORIENTATION] = turn
        image = Image.new("RGB", (H, W) if turn in (6, 8) else (W, H))
        alike = rng.random() < 0.9
        image = image if alike else image.resize((W + 1, H))
        image.save(path, exif=exif)
        form = rng.choice(["PNG", "PNG", "TIFF", "BMP", "GIF", "JPEG", "WEBP", "PPM", "TGA"])
        try:
            mask.save(file, format=form)
        except (OSError, ValueError, KeyError):            # Pillow does not write such
            return
        whole = rng.random() < 0.8
        raw = bytearray(file.read_bytes())
        if not whole:
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
            file.write_bytes(raw[:rng.randint(0, len(raw))] if rng.random() < 0.5 else raw)
        attempt(images.decode, file, (4, 4), rng.choice([1, 3]))
        found, line = attempt(masks.read_mask, path)
        if form in ("PNG", "TIFF") and mode in ("1", "L", "P", "I", "I;16") and alike and whole:
            assert found is not None, line
            assert (found.numpy() == (numbers > 0 if mode == "1" else numbers)).all()
        if found is None:
            return
        assert found.dtype == torch.uint8
        size, grid = ((rng.randint(1, n), rng.randint(1, n)) for n in (20, 4))
        classes, void = rng.randint(1, 256), rng.choice([0, 255, 300])
        counted = masks.count_pixels(found, size, grid, classes, void)
        seen = masks.seen_part(found, size)
        want = torch.zeros(grid[0] * grid[1], classes, dtype=torch.long)
        for (i, j), c in np.ndenumerate(seen.numpy()):
            if c < classes and c != void:
                r, s = ((2 * k + 1) * n // (2 * length)
                        for k, n, length in zip((i, j), grid, seen.shape))
                want[r * grid[1] + s, c] += 1
        assert torch.equal(counted, want)


def flags(rng, g):
    """Random flags, many of them impossible."""
    with tempfile.TemporaryDirectory() as root:
        for i in range(rng.choice([0, 1, 30])):
            path = Path(root) / "train" / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (rng.randint(1, 40), 9)).save(path)
        own = ["--data-root", root, "--data"]
        own += [rng.choice(["imagefolder"] * 9 + [*datasets.SETS, "x"])]
        fields = [*settings.Config.__dataclass_fields__.items()]
        for name, f in rng.sample(fields, rng.randint(0, 8)):
            values = ["0", "1", "2", "4", "-1", "7", str(rng.randint(0, 99))]
            values += ["nan", "inf", "1e9", "1e-400", f"{rng.random()}"] * (f.type is float)
            values += ["1%", "9:1", "16", "8x4", "0.5,nan"] * bool(f.metadata["type"])
            values = [*map(str, f.metadata["choices"] or values)]
            if rng.random() < 0.05:
                values = ["", "a\nb", "0x0", "9" * 400, "ü", "-"]
            if name not in ("data", "data_root"):
                own += ["--" + name.replace("_", "-")]
                own += [] if f.type is bool else [rng.choice(values)]
        config, line = attempt(settings.resolve, own)
        if config is None:
            return
        (H, W), (h, w) = mae.pair(config.img_size), mae.pair(config.patch_size)
        N = H // h * (W // w)
        assert H % h == W % w == 0 and 0 < mae.count_visible(N, config.mask_ratio) < N
        assert config.out and config.eval_every >= 1 and settings.describe(config)
        assert all(K <= samples or not samples
                   for _, samples, K in settings.samples_and_clusters(config))


def random_half_life(rng):
    return rng.choice(["0", "inf", "1%", "30", "100%", f"{rng.randint(1, 999)}",
                       f"{rng.uniform(0, 100)}%", "1e-300%", "1e300"])


def schedules(rng, g):
    total, text = rng.choice([1, 2, rng.randint(3, 300)]), random_half_life(rng)
    if rng.random() < 0.5:
        text = f"{text}:{random_half_life(rng)}"
    ends = text.split(":")
    m = [teachers.momentum(step, total, teachers.half_life(text)) for step in range(total)]
    first, last = (teachers.momentum(0, total, end) for end in (ends[0], ends[-1]))
    assert all(0 <= each <= 1 for each in m) and math.isclose(m[0], first, abs_tol=1e-12)
    assert total == 1 or math.isclose(m[-1], last, abs_tol=1e-12)
    ordered = sorted(m, reverse=last < first)
    assert all(abs(a - b) < 1e-12 for a, b in zip(m, ordered))
    config = settings.Config(lr=10 ** rng.uniform(-6, 0), warmup=rng.choice([0, 1, rng.random()]))
    assert all(0 <= train.learning_rate(step, total, config) <= config.lr * (1 + 1e-9)
               for step in range(total))
    try:
        teachers.half_life(rng.choice(["nan", "-1", "0.5", "101%", "1:2:3", "a\nb", "", "%"]))
        raise AssertionError("it was taken for a half-life")
    except ValueError as error:
        assert len(str(error).splitlines()) == 1
