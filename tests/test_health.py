import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import MEAN, STD, TOY, inputs, record_of, some_images

import train
from data import Batches
from mae import patchify
from pseudo_labels import Student, plain_norm, sinkhorn
from support import health, probes
from support.health import count_labels, nmi, purity, table
from support.pictures import to_pictures
from teachers import Teacher, standardise

CPU = torch.device("cpu")
VIEWS = dict(remove_place=False, crop=0.35, colours=1.0, teacher_view="same")


# ----------------------------------------------------------------------------------- while training

def test_monitor_is_knn_on_the_images_held_out():
    images = some_images(40, torch.arange(40) % 3, "abc")
    images.y[4] = -1                                  # an image to train on of unknown class
    images.pixels[:, 0] = 80 * (torch.arange(40) % 3)[:, None, None]
    encoder = Student(**TOY).mae.encoder
    train_ids, val_ids = torch.arange(30), torch.arange(30, 40)
    found = health.monitor(encoder, images, train_ids, val_ids, MEAN, STD, CPU)
    labelled = train_ids[train_ids != 4]
    x, test_x = (probes.features(encoder, images, ids, MEAN, STD, CPU)
                 for ids in (labelled, val_ids))
    want = {}
    for token in ("class", "mean"):
        predictions = probes.knn(x[token], images.y[labelled], test_x[token], 3)
        want[f"knn_{token}"] = probes.accuracy(predictions, images.y[val_ids])
        want[f"effective_rank_{token}"] = health.effective_rank(test_x[token])
    assert found == want and found["knn_mean"] > 0.9
    none = torch.arange(0)
    assert health.monitor(encoder, images, train_ids, none, MEAN, STD, CPU) == {}
    unlabelled = some_images(40)
    assert health.monitor(encoder, unlabelled, train_ids, val_ids, MEAN, STD, CPU) == {}


def test_effective_rank_and_spread():
    x = torch.randn(400, 16)
    x[:, 4:] = 0
    assert 3.5 < health.effective_rank(x) <= 4
    assert health.effective_rank(x + 100) == pytest.approx(health.effective_rank(x), abs=.1)
    assert health.spread(torch.randn(2000, 16)) == pytest.approx(1, abs=0.02)
    assert health.spread(torch.ones(50, 16) + 1e-4 * torch.randn(50, 16)) < 0.01
    y = torch.randn(400, 16)
    assert health.centred_cosine(y, 2 * y + 5) == pytest.approx(1, abs=1e-4)
    assert abs(health.centred_cosine(y + 9, torch.randn(400, 16) + 9)) < 0.1


# ------------------------------------------------------------------------------------------- assign

@pytest.fixture
def assigned(monkeypatch):
    """Called with settings and a chunk: a labelling teacher, 23 images, what it makes of them."""
    teacher = Teacher(Student(**TOY, image_clusters=5, patch_clusters=7), heads=True).double()
    images, ids = some_images(30), torch.arange(25, 2, -1)

    def call(chunk=1000, scores=2**27, balancing="sinkhorn"):
        monkeypatch.setattr(probes, "CHUNK", chunk)
        monkeypatch.setattr(health, "SCORES", scores)
        config = SimpleNamespace(balancing=balancing, teacher_temperature=0.0125,
                                 remove_place=False)
        return health.assign(teacher, config, images, ids, MEAN, STD, CPU)

    call.teacher, call.images, call.ids = teacher, images, ids
    return call


@pytest.mark.parametrize("chunk", [1, 7])
def test_assign_in_chunks_is_assign_at_once(assigned, chunk):
    """Labels are balanced over all images, not within a chunk."""
    at_once, in_chunks = assigned(), assigned(chunk)
    assert at_once["image"].labels.shape == (23, 5)
    assert at_once["patch"].labels.shape == (23, 16, 7)
    for name in ("image", "patch"):
        for one, other in zip(at_once[name], in_chunks[name]):
            torch.testing.assert_close(one, other)


def test_what_is_assigned(assigned):
    """Labels of the formula, the most probable cluster, and its cosine, by which pictures rank: at
    a temperature of 0.0125 most probabilities are 1."""
    teacher = assigned.teacher
    tokens = teacher.encode(inputs(assigned.images, assigned.ids))
    token = {"image": tokens[:, 0], "patch": plain_norm(tokens[:, 1:])}
    heads = {"image": teacher.image_head, "patch": teacher.patch_head}
    for name, (labels, cluster, cosine) in assigned().items():
        head = heads[name]
        want = sinkhorn(head(token[name]).flatten(0, -2), 0.0125)
        torch.testing.assert_close(labels.flatten(0, -2), want)
        assert torch.equal(cluster, labels.argmax(-1)) and len(cluster.unique()) > 1
        prototypes = head.prototypes[cluster]                                              # n (N) d
        by_hand = F.cosine_similarity(head.mlp(token[name]), prototypes, dim=-1)
        torch.testing.assert_close(cosine, by_hand)
        assert len(cosine.unique()) == cosine.numel()
        assert not (labels.requires_grad or cosine.requires_grad)


@pytest.mark.parametrize("chunk", [2, 1000])
def test_patches_are_assigned_of_as_many_images_as_there_is_room_for(assigned, chunk):
    found = assigned(chunk, scores=5 * 16 * 7 + 100)
    assert found["image"].labels.shape == (23, 5)
    assert found["patch"].labels.shape == (5, 16, 7) and found["patch"].cosine.shape == (5, 16)
    tokens = assigned.teacher.encode(inputs(assigned.images, assigned.ids[:5]))
    scores = assigned.teacher.patch_head(plain_norm(tokens[:, 1:])).flatten(0, 1)
    torch.testing.assert_close(found["patch"].labels.flatten(0, 1), sinkhorn(scores, 0.0125))


def test_what_is_assigned_without_the_place(assigned, monkeypatch):
    """Labels of scores less their mean at a place; the cosine stays a cosine."""
    monkeypatch.setattr(probes, "CHUNK", 7)
    config = SimpleNamespace(balancing="sinkhorn", teacher_temperature=0.0125, remove_place=True)
    found = health.assign(assigned.teacher, config, assigned.images, assigned.ids, MEAN, STD,
                              CPU)["patch"]
    tokens = assigned.teacher.encode(inputs(assigned.images, assigned.ids))
    scores = assigned.teacher.patch_head(plain_norm(tokens[:, 1:]))
    want = sinkhorn((scores - scores.mean(0)).flatten(0, 1), 0.0125).view_as(scores)
    torch.testing.assert_close(found.labels, want)
    torch.testing.assert_close(found.cosine, scores.gather(-1, found.cluster[..., None])[..., 0])


def test_assigning_uses_the_centres_and_leaves_them(assigned):
    plain = assigned(balancing="centring")
    assert not assigned.teacher.centres["image"].any()
    favourite = plain["image"].cluster.mode().values
    assigned.teacher.centres["image"][favourite] = 3       # its scores are 1 at most
    moved = assigned(balancing="centring")
    assert not (moved["image"].cluster == favourite).any()
    assert assigned.teacher.centres["image"].sum() == 3


def test_one_head_assigns_one_kind():
    config = SimpleNamespace(balancing="me-max", teacher_temperature=0.05, remove_place=False)
    images, ids = some_images(4), torch.arange(4)
    for clusters, kinds in (({"image_clusters": 5}, {"image"}), ({"patch_clusters": 5}, {"patch"})):
        teacher = Teacher(Student(**TOY, **clusters), heads=True)
        assert health.assign(teacher, config, images, ids, MEAN, STD, CPU).keys() == kinds


# -------------------------------------------------------------------------------------- reconstruct

def test_principal_colours_are_on_one_scale():
    tokens = torch.randn(50, 8, dtype=torch.float64)
    colours, others = health.principal_colours(tokens, tokens[:7])
    assert colours.shape == (50, 3) and 0 <= colours.min() and colours.max() <= 1
    torch.testing.assert_close(others, colours[:7])


@pytest.mark.parametrize("how", ["feature", "position", "token", "none"])
def test_token_targets_of_the_picture_are_standardised_over_all_images(monkeypatch, how):
    """Over all that are given, as in training over a batch; not over the few that are shown."""
    seen = []

    def colours(*tokens):
        seen.extend(tokens)
        return paint(*tokens)

    paint = health.principal_colours
    monkeypatch.setattr(health, "principal_colours", colours)
    student = Student(**TOY, target_dim=32)
    teacher, images, ids = Teacher(student), some_images(40), torch.arange(39, -1, -1)
    config = SimpleNamespace(target="tokens", mask_ratio=0.75, standardise=how)
    noise = torch.rand(3, 16)
    rows = health.reconstruct(student, teacher, config, images, ids, noise, MEAN, STD, CPU)
    assert {name: len(pictures) for name, pictures in rows.items()} == {
        "original": 3, "masked": 3, "teacher's tokens": 3, "prediction": 3}

    imgs = inputs(images, ids, torch.float32)
    tokens = teacher.encode(imgs)[:, 1:]                                                   # n N D
    chosen = probes.subset(torch.arange(40), 3)        # spread over a folder sorted by class
    target, shown = (x.view(3, 16, 32) for x in seen)
    torch.testing.assert_close(target, standardise(tokens, how)[chosen])
    over_the_shown = standardise(tokens[chosen], how)
    assert torch.allclose(target, over_the_shown, atol=1e-2) == (how in ("token", "none"))
    out = student(imgs[chosen], 0.75, noise)
    hidden = out["mask"][..., None] == 1
    torch.testing.assert_close(shown, torch.where(hidden, out["pred"], target))


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_pixels_are_predicted_where_they_are_hidden(norm_pix_loss):
    """A model of standardised patches borrows brightness and contrast from the original."""
    student, images, noise = Student(**TOY), some_images(6), torch.rand(8, 16)
    config = SimpleNamespace(target="pixels", mask_ratio=0.75, norm_pix_loss=norm_pix_loss)
    ids = torch.arange(6)                                  # fewer than there is noise for
    rows = health.reconstruct(student, None, config, images, ids, noise, MEAN, STD, CPU)
    assert rows.keys() == {"original", "masked", "prediction"}

    imgs = inputs(images, ids, torch.float32)
    out = student(imgs, 0.75, noise[:6])
    pred, patches = out["pred"], patchify(imgs, 4)
    if norm_pix_loss:
        pred = pred * patches.std(-1, keepdim=True) + patches.mean(-1, keepdim=True)
    want = {"original": patches, "masked": torch.zeros_like(patches), "prediction": pred}
    hidden = out["mask"][..., None] == 1
    for name, pictures in rows.items():
        x = torch.where(hidden, want[name], patches)
        x = x.view(6, 4, 4, 4, 4, 3).permute(0, 5, 1, 3, 2, 4).reshape(6, 3, 16, 16)
        for picture, by_hand in zip(pictures, to_pictures(x, MEAN, STD)):
            torch.testing.assert_close(picture, by_hand, atol=1e-4, rtol=0)


# ---------------------------------------------------------------------------------------- diagnosis

def test_diagnose(small_run, capsys, no_pictures):
    """Of a finished run: features and pseudo labels in numbers. A teacher that copied the student
    agrees with it entirely."""
    train.main([*small_run, "--labelling-half-life", "0", "--reconstruction-half-life", "20"])
    path = f"{small_run[-1]}/checkpoint.pt"
    for network in ("student", "labelling-teacher", "reconstruction-teacher"):
        record = record_of(capsys, "diagnose", "--checkpoint", path, "--network", network)
        assert (record["task"], record["network"], record["images"]) == ("diagnose", network, 7)
        for token in ("class", "mean"):
            assert record[f"student_vs_labelling-teacher_{token}"] == pytest.approx(1)
            assert record[f"student_vs_reconstruction-teacher_{token}"] < 1
            assert 1 <= record[f"effective_rank_{token}"] <= 7
            assert 0 < record[f"spread_{token}"] <= 1
        for name, clusters in (("image", 4), ("patch", 16)):
            assert record[f"{name}_ln_k"] == pytest.approx(math.log(clusters), abs=1e-4)
            assert 0 <= record[f"{name}_entropy"] <= record[f"{name}_ln_k"]
            assert 1 <= record[f"{name}_clusters"] <= clusters
            assert 1 <= record[f"{name}_effective"] <= clusters + 1e-3
            assert 1 / clusters <= record[f"{name}_largest"] <= 1
            for agreement in ("nmi", "nmi_shuffled", "purity", "purity_shuffled"):
                assert 0 <= record[f"{name}_{agreement}"] <= 1
            assert record[f"{name}_purity"] >= 1 / 3
        assert 0 <= record["patch_nmi_place"] <= 1 and "image_nmi_place" not in record


def test_diagnose_tells_pseudo_labels_that_are_classes():
    """A labelling teacher with a prototype for each class finds pure clusters. A student with other
    prototypes does not agree with it."""
    images, ids = some_images(60, torch.arange(60) % 3, "abc"), torch.arange(60)
    images.pixels[:, 0] = 80 * (torch.arange(60) % 3)[:, None, None]
    student = Student(**TOY, image_clusters=3)
    teacher = Teacher(student, heads=True)
    config = SimpleNamespace(balancing="sinkhorn", teacher_temperature=0.0125, **VIEWS)
    with torch.no_grad():
        unit = teacher.image_head.project(teacher.encode(inputs(images, ids, torch.float32))[:, 0])
        for label in range(3):
            of_class = unit[images.y == label].mean(0)
            teacher.image_head.prototypes[label] = of_class - unit.mean(0)
    found = health.diagnose_labels(teacher, config, images, ids, MEAN, STD, CPU)
    assert found["image_purity"] > 0.9 and found["image_nmi"] > 0.8
    assert found["image_purity_shuffled"] < 0.6 and found["image_nmi_shuffled"] < 0.2
    assert not any(name.startswith("patch") for name in found)
    images.y[7] = -1                                  # not all have a class: no agreement
    found = health.diagnose_labels(teacher, config, images, ids, MEAN, STD, CPU)
    assert not any("purity" in name or "nmi" in name for name in found)


def labels_of(cluster, K):
    """Pseudo labels that are certain of these clusters."""
    return health.Assigned(F.one_hot(cluster, K).float(), cluster, torch.ones(cluster.shape))


@pytest.mark.parametrize("what", ["place", "colour", "mask", "noise"])
def test_agreements_tell_what_patch_pseudo_labels_hold(what):
    """Labels that are made of one thing agree with it, and with chance alone in the others."""
    images, ids = some_images(40), torch.arange(5, 40)
    images.targets["masks"] = torch.randint(0, 4, (40, 4, 4)).repeat_interleave(
        4, 1).repeat_interleave(4, 2).byte()               # each patch is of one class
    patches = patchify(inputs(images, ids, torch.float32), 4)
    cluster = {"place": torch.arange(16).expand(35, 16),
               "colour": health.colour_bins(patches, 3),
               "mask": images.targets["masks"][ids][:, ::4, ::4].flatten(1).long(),
               "noise": torch.randint(0, 8, (35, 16))}[what]
    teacher = Teacher(Student(**TOY, patch_clusters=7), heads=True)
    labels = {"patch": labels_of(cluster, 64)}
    found = health.agreements(labels, teacher, None, images, ids, MEAN, STD, CPU)
    for name in ("place", "colour", "mask"):
        agreement, chance = found[f"patch_nmi_{name}"], found[f"patch_nmi_{name}_shuffled"]
        assert agreement == pytest.approx(1) if name == what else agreement < chance + 0.06


def test_colours_are_binned_evenly():
    patches = torch.rand(50, 20, 12)                       # of 4 pixels in 3 channels
    bins = health.colour_bins(patches, 3)
    assert bins.shape == (50, 20) and len(bins.unique()) == 64
    red = patches.unflatten(-1, (4, 3)).mean(2)[..., 0]
    quarter = bins // 16                                   # 4 bins of red, of equal size
    assert quarter.unique(return_counts=True)[1].tolist() == [250] * 4
    assert red[quarter == 0].max() < red[quarter == 1].min()
    assert len(health.colour_bins(patches, 1).unique()) == 64


def test_two_views_of_an_image_agree_where_labels_see_what_views_share():
    """Images of three flat colours: crops of them are alike. Noise is not like itself."""
    images, ids = some_images(60), torch.arange(60)
    teacher = Teacher(Student(**TOY, image_clusters=3), heads=True)
    config = SimpleNamespace(balancing="sinkhorn", teacher_temperature=0.0125, crop=0.35,
                             colours=0.0, teacher_view="same")
    noise = health.two_views_agree(teacher, config, images, ids, MEAN, STD, CPU)
    images.pixels[:] = 120 * (torch.arange(60) % 3)[:, None, None, None]
    flat = health.two_views_agree(teacher, config, images, ids, MEAN, STD, CPU)
    for found in (noise, flat):
        assert found["image_two_views_chance"] == pytest.approx(1 / 3, abs=0.1)
    assert flat["image_two_views"] > 0.95 > 0.8 > noise["image_two_views"]
    again = health.two_views_agree(teacher, config, images, ids, MEAN, STD, CPU)
    assert again == flat


def test_two_views_are_what_the_teacher_sees_in_training(monkeypatch):
    """The views of Batches, of the run's own settings, a chunk at a time."""
    images, ids = some_images(21), torch.arange(21)
    teacher = Teacher(Student(**TOY, image_clusters=3), heads=True)
    config = SimpleNamespace(balancing="sinkhorn", teacher_temperature=0.0125, crop=0.5,
                             colours=2.0, teacher_view="other-colours")
    monkeypatch.setattr(health, "CHUNK", 7)
    found = health.two_views_agree(teacher, config, images, ids, MEAN, STD, CPU)
    batches = Batches(images, ids, MEAN, STD, seed=0, batch=7, patches=16, views=2,
                      smallest=0.5, colours=2.0, teacher_view="other-colours")
    scores = torch.cat([teacher.image_head(teacher.encode(views.teacher)[:, 0]).view(2, 7, 3)
                        for views in batches.run(0, 3)], dim=1)
    cluster = sinkhorn(scores.flatten(0, 1), 0.0125).argmax(1).view(2, 21)
    assert found["image_two_views"] == probes.accuracy(*cluster)


def test_diagnose_without_pseudo_labels(small_run, capsys, no_pictures):
    train.main([*small_run, "--epochs", "0", "--recipe", "mae"])
    record = record_of(capsys, "diagnose", "--checkpoint", f"{small_run[-1]}/checkpoint.pt")
    assert record["student_vs_reconstruction-teacher_mean"] == pytest.approx(1)
    assert not any(name.startswith(("image_", "patch_")) for name in record)


# ---------------------------------------------------------------- two labellings of n samples

def test_table_counts_pairs():
    a = torch.tensor([0, 2, 2, 0])
    b = torch.tensor([1, 0, 0, 1])
    assert table(a, b).tolist() == [[0, 2], [0, 0], [2, 0]]


def test_nmi_of_a_case_worked_by_hand():
    a = np.array([0, 0, 1, 1])
    b = np.array([0, 1, 1, 1])
    mutual = (0.25 * np.log(0.25 / (0.5 * 0.25)) + 0.25 * np.log(0.25 / (0.5 * 0.75))
              + 0.5 * np.log(0.5 / (0.5 * 0.75)))
    entropies = -np.log(0.5) - 0.25 * np.log(0.25) - 0.75 * np.log(0.75)
    assert nmi(a, b) == pytest.approx(2 * mutual / entropies)


def test_nmi_at_its_ends():
    classes = np.arange(60) % 3
    assert nmi((classes + 1) % 3, classes) == pytest.approx(1)           # names do not count
    assert nmi(np.zeros(60, int), classes) == pytest.approx(0)
    assert nmi(np.zeros(60, int), np.zeros(60, int)) == 1


def test_nmi_is_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    for clusters in (2, 9, 40):
        a = rng.integers(0, clusters, 200)
        b = np.where(rng.random(200) < 0.5, a % 5, rng.integers(0, 5, 200))
        assert nmi(a, b) == pytest.approx(metrics.normalized_mutual_info_score(a, b))


def test_purity_is_the_accuracy_of_naming_clusters():
    rng = np.random.default_rng(0)
    clusters = torch.from_numpy(rng.integers(0, 12, 200))
    classes = torch.from_numpy(rng.integers(0, 5, 200))
    right = 0
    for cluster in range(12):
        members = classes[clusters == cluster].tolist()
        right += max(members.count(name) for name in range(5))
    assert purity(clusters, classes) == right / 200
    assert purity(classes + 5 * (clusters > 6), classes) == 1     # a class may have many clusters
    assert purity(np.arange(200), classes) == 1                   # chance grows with clusters


# ----------------------------------------------------------------------------- the health of labels

def test_purest_and_least_pure_clusters():
    """Of 5 clusters of 10 images, 10, 9, 5, 7 and 7 of one class; one of a single image is none."""
    images = some_images(51, classes=["cat", "dog"])
    cluster = torch.arange(51) // 10
    images.y = torch.tensor([1] * 10 + [0] + [1] * 9 + [0, 1] * 5 + ([1, 1, 1] + [0] * 7) * 2 + [0])
    ids, grid = torch.arange(51), (4, 4)
    found = health.purest_and_least_pure("image", cluster, images, ids, grid, each=1)
    assert found == {0: "cluster 0: 100% dog", 2: "cluster 2: 50% cat"}
    order = list(health.purest_and_least_pure("image", cluster, images, ids, grid))
    assert order == [0, 1, 4, 3, 2]
    images.y[3] = -1                       # a class is not known
    assert health.purest_and_least_pure("image", cluster, images, ids, grid) == {}
    assert health.purest_and_least_pure("patch", cluster, images, ids, grid) == {}


def test_health():
    spread = health.health(count_labels(torch.eye(4).repeat(3, 1)))
    want = dict(entropy=0, clusters=4, effective=4, largest=0.25)
    assert spread == pytest.approx(want, abs=1e-5)
    gathered = health.health(count_labels(torch.eye(4)[[1, 1, 1, 1]].reshape(2, 2, 4)))
    want = dict(entropy=0, clusters=1, effective=1, largest=1)
    assert gathered == pytest.approx(want, abs=1e-5)
    vague = health.health(count_labels(torch.full((5, 4), 0.25)))
    assert (vague["entropy"], vague["effective"]) == pytest.approx((math.log(4), 4), abs=1e-5)


def test_counts_are_means_over_samples():
    """So that their mean over steps of equal size is the count of all samples of these steps."""
    labels = (torch.randn(3, 8, 5, dtype=torch.float64) / 0.1).softmax(-1)     # 3 steps of 8
    mean = sum(count_labels(step) for step in labels) / 3
    torch.testing.assert_close(mean, count_labels(labels))
    q = labels.flatten(0, 1)
    torch.testing.assert_close(mean[:5], q.mean(0))
    torch.testing.assert_close(mean[5:10], F.one_hot(q.argmax(1), 5).double().mean(0))
    torch.testing.assert_close(mean[10], -(q * q.log()).sum(1).mean())
