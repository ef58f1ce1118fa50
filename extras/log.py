"""The log of a run: its numbers, its line on the screen, its warnings."""

import math

from pseudo_labels import health, over_ranks


def averages(sums, count):
    """What was summed up over steps, by each rank, as numbers per step; of counted labels ln K and their health."""
    record = {}
    for name, value in sums.items():
        value, label = over_ranks(value) / count, name.removesuffix("_counts")
        if label == name:
            record[name] = value.item()
        else:
            record |= {f"{label}_ln_k": math.log((len(value) - 2) // 2)} | {f"{label}_{k}": v for k, v in health(value).items()}
    return record


def line(record):
    """A record of the log as a line for the screen."""
    parts = ["step {step:6d}  epoch {epoch:6.1f}  loss {loss:.4f}".format(**record)]
    for name, bound, sign in (("rec", "rec_constant", "constant"), ("consistency", "", ""), ("class", "class_ln_k", "ln K"),
                              ("data", "data_ln_k", "ln K")):
        if name in record:
            parts.append(f"{name} {record[name]:.3f}" + (f" ({sign} {record[bound]:.2f})" if bound in record else ""))
    return "  ".join([*parts, "{images_per_s:.0f} images/s  {eta_s:.0f} s to go".format(**record)])


def signs_of_collapse(record):
    """Sentences on what looks wrong in a record of the log: a set, empty in health."""
    signs = set()
    for name in ("class", "data"):
        if f"{name}_ln_k" not in record:
            continue
        ln_k, effective = record[f"{name}_ln_k"], record[f"{name}_effective"]
        if record[name] > 0.99 * ln_k:
            signs.add(f"the {name} loss stays at ln K = {ln_k:.2f}: labels are not being predicted")
        if record[f"{name}_entropy"] > 0.98 * ln_k:
            signs.add(f"the {name} labels are nearly uniform: they say nothing; try a lower --teacher-temperature")
        if effective < max(2, 0.1 * math.exp(ln_k)):
            signs.add(f"the {name} labels gather in few of their clusters: try --balancing sinkhorn or fewer clusters")
    if record.get("rec_between", 1) < 0.05:
        signs.add("the token targets hardly differ between images: they can be predicted without looking")
    return signs
