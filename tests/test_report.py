import math

from support.health import signs_of_collapse
from support.report import line

WELL = {
    "image": 3.0,
    "image_ln_k": math.log(64),
    "image_entropy": 2.0,
    "image_effective": 60.0,
    "rec_between": 0.5,
}


def test_nothing_is_said_in_health():
    assert signs_of_collapse(WELL) == set()
    assert signs_of_collapse({"rec": 0.5}) == set()


def test_signs_of_collapse():
    ills = {
        "not being predicted": {"image": math.log(64)},
        "uniform": {"image_entropy": math.log(64)},
        "few": {"image_effective": 1.5},
        "targets": {"rec_between": 0.01},
    }
    for word, ill in ills.items():
        (sign,) = signs_of_collapse(WELL | ill)
        assert word in sign
        assert word == "targets" or "image pseudo labels" in sign


def test_patch_pseudo_labels_are_watched_too():
    well = {key.replace("image", "patch"): value for key, value in WELL.items()}
    assert signs_of_collapse(well) == set()
    (sign,) = signs_of_collapse(well | {"patch_effective": 1.5})
    assert "patch pseudo labels" in sign


def test_line_shows_what_the_record_has():
    record = dict(step=50, epoch=0.6, loss=4.25, images_per_s=812.3, eta_s=61.0)
    start = "step     50  epoch    0.6  loss 4.2500"
    assert line(record) == f"{start}  812 images/s  61 s to go"
    record |= dict(rec=0.5, image=3.0, image_ln_k=math.log(32), peak_memory_gb=3.21)
    losses = "rec 0.500  image 3.000 (ln K 3.47)"
    assert line(record) == f"{start}  {losses}  812 images/s  peak 3.2 GB  61 s to go"
    assert "rec 0.500 (constant 0.91)" in line(record | dict(rec_constant=0.911))
