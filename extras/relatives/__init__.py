"""Four other ways to change an MAE: docs/relatives.md. Each file offers

    SETTINGS           its row of settings, as those in support/settings.py
    Config             the flags of train.py, and those of its own
    check              refuses settings that it has no use for
    Student            .mae.encoder is what one keeps; (imgs, mask_ratio, noise) -> a dictionary
                       with "pred" B N P and "mask" B N
    training_step      as in train.py, and called by the same loop
"""

from mae import masked_mse, pixel_target
from pseudo_labels import full_precision
from support.command_line import UsageError, flag

# These settings make the method: no flag may change them. The rest of a row, flags may change.
FIXED = ("target", "standardise", "views", "image_weight", "patch_weight", "consistency_weight",
         "compile")
SHARED = dict(image_weight=0.0, patch_weight=0.0, consistency_weight=0.0, views=1, colours=0.0)


def check_fixed(config, row):
    """Raises UsageError for flags that would make another method of it."""
    for name in FIXED:
        if name in row and getattr(config, name) != row[name]:
            raise UsageError(f"{flag(name)} {getattr(config, name)}: in {config.recipe} it is "
                             f"{row[name]}; leave it out")


def pixel_loss(out, views, config):
    """MAE's loss of what a student predicts (out["pred"] B N P, out["mask"] B N): a number."""
    pixels = pixel_target(views.student, config.patch_size, config.norm_pix_loss)        # B N P
    with full_precision(pixels):
        return masked_mse(out["pred"], pixels, out["mask"])
