import copy

import pytest
import torch
from conftest import TOY

from pseudo_labels import Student
from teachers import between_images, ema_update, half_life, make_teacher, momentum, standardise

STUDENT = dict(TOY, class_clusters=5, data_clusters=7, target_dim=32)


@pytest.mark.parametrize("m", [0.0, 0.5, 1.0])
def test_ema_equals_its_formula(m):
    student = Student(**STUDENT)
    teacher = make_teacher(student)
    for p in student.parameters():
        p.data += torch.randn_like(p)
    old = copy.deepcopy(teacher)
    ema_update(teacher, student, m)
    for t, o, s in zip(teacher.parameters(), old.parameters(), student.parameters()):
        if m == 0.5:
            torch.testing.assert_close(t, 0.5 * o + 0.5 * s)
        else:
            assert torch.equal(t, s if m == 0 else o)


def test_half_life_is_the_half_life():
    """After h updates towards a student of zeros, half of the teacher is left."""
    student = torch.nn.Linear(3, 3).double()
    teacher = make_teacher(student)
    start = teacher.weight.clone()
    torch.nn.init.zeros_(student.weight)
    for step in range(25):
        ema_update(teacher, student, momentum(step, 100, "25"))
    torch.testing.assert_close(teacher.weight, start / 2)
    assert momentum(3, 2500, "0.01") == momentum(70, 100, "25")                # a share of the run


def test_momentum_at_both_ends_and_between():
    assert momentum(0, 1000, "173:inf") == pytest.approx(0.996, abs=1e-5) and momentum(999, 1000, "173:inf") == 1
    values = [momentum(s, 1000, "0.01:0.1") for s in range(1000)]
    assert values == sorted(values) and values[0] == 0.5 ** (1 / 10) and values[-1] == pytest.approx(0.5 ** (1 / 100))
    assert momentum(5, 10, "0") == 0 and momentum(0, 1, "inf") == 1
    assert half_life("173:inf") == "173:inf"
    for text in ("-1", "1:2:3", "nan", "soon", ""):
        with pytest.raises(ValueError):
            half_life(text)


def test_a_teacher_shares_nothing_and_learns_nothing():
    student = Student(**STUDENT)
    student.register_buffer("seen", torch.zeros(2))
    labelling, reconstruction = make_teacher(student, ("decoder_", "mask_token")), make_teacher(student, ("decoder_", "mask_token", "class_head", "data_head"))
    names = lambda module: set(module.state_dict())
    encoder = {n for n in names(student) if not n.startswith(("decoder_", "mask_token", "class_head", "data_head"))}
    assert names(reconstruction) == encoder and names(labelling) == encoder | {n for n in names(student) if "_head" in n}
    places = [{t.data_ptr() for t in module.state_dict().values()} for module in (student, labelling, reconstruction)]
    assert not places[0] & places[1] and not places[1] & places[2] and not places[0] & places[2]
    assert not any(p.requires_grad for t in (labelling, reconstruction) for p in t.parameters())
    student.seen += 3
    ema_update(labelling, student, 0.9)
    assert labelling.seen.tolist() == [3, 3] and labelling.seen.data_ptr() != student.seen.data_ptr()


@pytest.mark.parametrize("how, over", [("token", 2), ("feature", (0, 1)), ("position", 0)])
def test_standardised_targets(how, over):
    tokens = torch.randn(64, 9, 32) * (0.5 + torch.rand(32)) + torch.randn(9, 32)
    target = standardise(tokens, how)
    mean, var = target.mean(over), target.var(over, unbiased=False)
    torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-5, rtol=0)
    torch.testing.assert_close(var, torch.ones_like(var), atol=1e-3, rtol=0)
    assert torch.equal(standardise(tokens, "none"), tokens)


def test_best_constant_prediction():
    tokens = torch.randn(40, 6, 8, dtype=torch.float64) + 2 * torch.randn(6, 8)
    between, share = between_images(tokens)
    guess = tokens.mean(0)                                 # the best for each position that does not look at the image
    torch.testing.assert_close(between, (tokens - guess).square().mean())
    assert all((tokens - guess - 0.1 * torch.randn(6, 8)).square().mean() > between for _ in range(5))
    whole = (tokens - tokens.mean((0, 1))).square().mean()
    torch.testing.assert_close(share, between / whole)
    assert between_images(tokens[:1].expand(5, -1, -1))[1] < 1e-20             # the same in every image
