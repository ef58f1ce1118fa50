import copy

import pytest
import torch
from conftest import TOY

from pseudo_labels import Student
from support import settings
from teachers import (
    Teacher,
    Teachers,
    between_images,
    ema_update,
    half_life,
    make_teachers,
    momentum,
    standardise,
)

STUDENT = dict(TOY, image_clusters=5, patch_clusters=7)


def changed(student):
    """The student after some optimiser step."""
    with torch.no_grad():
        for p in student.parameters():
            if p.requires_grad:
                p += torch.randn_like(p)
    return student


# ------------------------------------------------------------------------------------- the teachers

@pytest.mark.parametrize("m", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("parts", [dict(), dict(heads=True), dict(decoder=True)])
def test_following_equals_its_formula(m, parts):
    student = Student(**STUDENT)
    teacher = Teacher(student, **parts)
    old = copy.deepcopy(teacher)
    teacher.follow(changed(student), m)
    theirs = dict(student.named_parameters()) | dict(student.mae.named_parameters())
    before = dict(old.named_parameters())
    assert any(not torch.equal(theirs[name], p) for name, p in before.items())
    for name, p in teacher.named_parameters():
        if m in (0, 1):                                    # to the bit
            assert torch.equal(p, theirs[name] if m == 0 else before[name])
        else:
            torch.testing.assert_close(p, m * before[name] + (1 - m) * theirs[name])


def test_half_life_is_the_half_life():
    """After h updates towards a student of zeros, half of the teacher is left."""
    average = [torch.randn(3, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)]
    start = [x.clone() for x in average]
    zeros = [torch.zeros_like(x) for x in average]
    for step in range(25):
        ema_update(average, zeros, momentum(step, 100, "25"))
    torch.testing.assert_close(average, [x / 2 for x in start])


def test_a_teacher_shares_nothing_and_learns_nothing():
    student = Student(**STUDENT)
    teachers = [Teacher(student), Teacher(student, heads=True), Teacher(student, decoder=True)]
    places = set()
    for module in (student, *teachers):
        own = {x.data_ptr() for x in module.state_dict().values()}
        assert not places & own
        places |= own
    assert any(p.requires_grad for p in student.parameters())
    for teacher in teachers:
        assert not any(p.requires_grad for p in teacher.parameters())
        assert not teacher.encode(torch.randn(2, 3, 16, 16)).requires_grad
        before = copy.deepcopy(teacher.state_dict())
        changed(student)
        assert all(torch.equal(x, before[name]) for name, x in teacher.state_dict().items())


def test_a_fresh_teacher_says_what_the_student_says():
    """Of whole views, and, as RC-MAE's does, of views under the student's masks."""
    student = Student(**STUDENT)
    imgs, noise = torch.randn(4, 3, 16, 16), torch.rand(4, 16)
    teacher = Teacher(student, decoder=True)
    assert torch.equal(teacher.encode(imgs), student.mae.encoder(imgs))
    assert torch.equal(teacher.predict_pixels(imgs, 0.75, noise),
                       student(imgs, 0.75, noise)["pred"])


def test_centres_do_not_follow_the_student():
    """They are the labelling teacher's own, and go into its checkpoint."""
    student = Student(**STUDENT)
    teacher = Teacher(student, heads=True)
    assert {name: len(centre) for name, centre in teacher.centres.items()} == dict(image=5, patch=7)
    teacher.centres["image"] += 3
    teacher.follow(changed(student), 0)
    assert teacher.centres["image"].tolist() == [3] * 5
    assert teacher.centres["patch"].tolist() == [0] * 7
    loaded = Teacher(student, heads=True)
    loaded.load_state_dict(teacher.state_dict())
    assert loaded.centres["image"].tolist() == [3] * 5
    assert Teacher(student).centres == {}
    assert Teacher(Student(**TOY, image_clusters=5), heads=True).centres.keys() == {"image"}


HEADS = {"image_head", "patch_head"}


@pytest.mark.parametrize("flags, labelling, reconstruction", [
    ("--recipe mae", None, {"encoder"}),
    ("--recipe rc-mae", None, {"encoder", "decoder"}),
    ("--recipe mim-cluster", {"encoder"} | HEADS, None),
    ("--recipe image-labels", {"encoder", "image_head"}, None),
    ("--recipe pl-mae-one-teacher", {"encoder"} | HEADS, "the same"),
    ("--recipe pl-mae", {"encoder"} | HEADS, {"encoder"}),
    ("--recipe pl-mae --image-weight 0", {"encoder", "patch_head"}, {"encoder"}),
    ("--image-weight 0 --patch-weight 0", None, {"encoder"}),
    ("--recipe mim-cluster --consistency-weight 1", {"encoder"} | HEADS, {"encoder", "decoder"}),
])
def test_who_teaches(flags, labelling, reconstruction):
    config = settings.resolve(flags.split())
    student = Student(**TOY, target_dim=0 if config.target == "none" else None,
                      image_clusters=5 if config.image_weight else 0,
                      patch_clusters=7 if config.patch_weight else 0)
    teachers = make_teachers(student, config)
    wanted = {"labelling": labelling}
    if reconstruction == "the same":
        assert teachers.reconstruction is teachers.labelling
    else:
        assert teachers.reconstruction is not teachers.labelling
        wanted["reconstruction"] = reconstruction
    wanted = {name: parts for name, parts in wanted.items() if parts is not None}
    assert {name: {part for part, _ in teacher.named_children()}
            for name, teacher in teachers.named().items()} == wanted


def test_each_teacher_follows_at_its_own_pace_and_one_in_two_roles_once():
    student = Student(**STUDENT)
    labelling, reconstruction = Teacher(student, heads=True), Teacher(student)
    teachers = Teachers(labelling, reconstruction)
    start = copy.deepcopy(labelling)
    changed(student)
    teachers.follow(student, {"labelling": 1, "reconstruction": 0})
    for name, p in labelling.named_parameters():
        assert torch.equal(p, start.get_parameter(name))
    for name, p in reconstruction.encoder.named_parameters():
        assert torch.equal(p, student.mae.encoder.get_parameter(name))

    one = Teachers(labelling, labelling)
    assert one.named() == {"labelling": labelling}
    one.follow(student, {"labelling": 0.5})
    for name, p in labelling.image_head.named_parameters():
        half_way = (start.image_head.get_parameter(name)
                    + student.image_head.get_parameter(name)) / 2
        torch.testing.assert_close(p, half_way)
    assert Teachers(None, None).named() == {}


# ------------------------------------------------------------------------------------ the schedules

def test_momentum_at_both_ends_and_between():
    assert momentum(3, 2500, "1%") == momentum(70, 100, "25") == 0.5 ** (1 / 25)
    assert momentum(0, 1000, "173:inf") == pytest.approx(0.996, abs=1e-5)
    assert momentum(999, 1000, "173:inf") == 1
    values = [momentum(step, 1000, "1%:10%") for step in range(1000)]
    assert values == sorted(values)
    assert values[0] == 0.5 ** (1 / 10) and values[-1] == pytest.approx(0.5 ** (1 / 100))
    assert momentum(999, 1000, "1%:30") == pytest.approx(0.5 ** (1 / 30))
    assert momentum(5, 10, "0") == 0 and momentum(0, 1, "inf") == 1
    assert 0 < momentum(5, 10, "1%") < 0.01                # a tenth of a step: nearly the student


@pytest.mark.parametrize("text", ["1%", "0.3%", "100%", "0%", "30", "1", "1.5", "0", "inf",
                                  "173:inf", "1%:10%", "30:5%"])
def test_half_lives(text):
    assert half_life(text) == text


@pytest.mark.parametrize("text", ["0.01", "0.5", "30:0.5", "-1", "-1%", "101%", "inf%", "nan",
                                  "nan%", "1:2:3", "soon", "%", "", "30:", "1 %%"])
def test_what_is_no_half_life(text):
    """0.01 could mean a hundredth of the run, or of a step."""
    with pytest.raises(ValueError):
        half_life(text)


# ------------------------------------------------------------------------------------ token targets

@pytest.mark.parametrize("how, over", [("token", 2), ("feature", (0, 1)), ("position", 0)])
def test_standardised_targets(how, over):
    tokens = torch.randn(64, 9, 32) * (0.5 + torch.rand(32)) + torch.randn(9, 32)
    target = standardise(tokens, how)
    mean, var = target.mean(over), target.var(over, unbiased=False)
    torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-5, rtol=0)
    torch.testing.assert_close(var, torch.ones_like(var), atol=1e-3, rtol=0)
    assert torch.equal(standardise(tokens, "none"), tokens)
    assert standardise(tokens.bfloat16(), how).dtype == torch.float32


def test_best_constant_prediction():
    tokens = torch.randn(40, 6, 8, dtype=torch.float64) + 2 * torch.randn(6, 8)
    between, share = between_images(tokens)
    guess = tokens.mean(0)             # the best for each position that does not look at the image
    torch.testing.assert_close(between, (tokens - guess).square().mean())
    for _ in range(5):
        other = guess + 0.1 * torch.randn(6, 8)
        assert (tokens - other).square().mean() > between
    whole = (tokens - tokens.mean((0, 1))).square().mean()
    torch.testing.assert_close(share, between / whole)
    same_everywhere = tokens[:1].expand(5, -1, -1)
    assert between_images(same_everywhere)[1] < 1e-20
