"""The log of a run: a record as a line on the screen, and warnings about it.

A record is a dictionary, one line of metrics.jsonl. `image` and `patch` are the losses of the image
and of the patch pseudo labels; docs/guide.md says what every key means.
"""

import math


def line(record):
    """A record of the log as a line for the screen."""
    parts = [f"step {record['step']:6d}  epoch {record['epoch']:6.1f}  loss {record['loss']:.4f}"]
    if "rec" in record:
        parts.append(beside(record, "rec", "rec_constant", "constant"))
    if "consistency" in record:
        parts.append(f"consistency {record['consistency']:.3f}")
    for name in ("image", "patch"):
        if name in record:
            parts.append(beside(record, name, f"{name}_ln_k", "ln K"))
    if "koleo" in record:
        parts.append(f"koleo {record['koleo']:.3f}")
    parts.append(f"{record['images_per_s']:.0f} images/s")
    if "peak_memory_gb" in record:
        parts.append(f"peak {record['peak_memory_gb']:.1f} GB")
    parts.append(f"{record['eta_s']:.0f} s to go")
    return "  ".join(parts)


def beside(record, name, bound, sign):
    """A loss and, if it is there, the bound that it should go below: "image 2.91 (ln K 3.47)"."""
    text = f"{name} {record[name]:.3f}"
    if bound in record:
        text += f" ({sign} {record[bound]:.2f})"
    return text


def signs_of_collapse(record):
    """Sentences on what looks wrong in a record of the log: a set, empty in health."""
    signs = set()
    for name in ("image", "patch"):
        if f"{name}_ln_k" not in record:
            continue
        ln_k = record[f"{name}_ln_k"]
        clusters = math.exp(ln_k)
        if record[name] > 0.99 * ln_k:
            signs.add(f"the loss of the {name} pseudo labels stays at ln K = {ln_k:.2f}: they are "
                      "not being predicted")
        if record[f"{name}_entropy"] > 0.98 * ln_k:
            signs.add(f"the {name} pseudo labels are nearly uniform: they say nothing; try a lower "
                      "--teacher-temperature")
        if record[f"{name}_effective"] < max(2, 0.1 * clusters):
            signs.add(f"the {name} pseudo labels gather in few of their clusters: try --balancing "
                      "sinkhorn or fewer clusters")
    if record.get("rec_between", 1) < 0.05:
        signs.add("the token targets hardly differ between images: they can be predicted without "
                  "looking")
    return signs
