import math

import matplotlib.image
import numpy as np
import pytest
import torch

from support import pictures
from support.pictures import (
    curves,
    draw_components,
    draw_few,
    draw_neighbours,
    galleries,
    mosaic,
    surroundings,
    to_pictures,
)


def flat_pictures(n):
    """Pictures 8 x 8 of one grey, by which a test knows them: number i is i / 100."""
    return [np.full((8, 8), i / 100) for i in range(n)]


def numbers(shown):
    return [round(100 * float(picture[4, 4])) for picture in shown]


def test_galleries_show_the_commonest_clusters_and_in_them_the_highest_cosine_first():
    labels = torch.tensor([3, 1, 3, 3, 1, 0])
    cosines = torch.tensor([0.2, 0.7, 0.9, 0.5, 0.8, 0.1])
    rows = galleries(labels, cosines, flat_pictures(6), clusters=2)
    assert list(rows) == [3, 1]
    assert numbers(rows[3]) == [2, 3, 0]
    assert numbers(rows[1]) == [4, 1]
    assert numbers(galleries(labels, cosines, flat_pictures(6), columns=2)[3]) == [2, 3]


def test_galleries_show_one_patch_of_an_image():
    labels = torch.zeros(3, 4, dtype=torch.long)
    cosines = torch.tensor([[0.1, 0.2, 0.3, 0.1], [0.9, 0.8, 0.9, 0.7], [0.5, 0.6, 0.4, 0.3]])
    images = flat_pictures(5)                                      # more pictures than labels
    rows = galleries(labels, cosines, images, grid=(2, 2))
    assert list(rows) == [0]
    for shown, image, place in zip(rows[0], (1, 2, 0), (0, 1, 2), strict=True):
        assert np.array_equal(shown, surroundings(images[image], place, (2, 2)))


@pytest.mark.parametrize("channels", [(), (3,)])
def test_surroundings_frame_the_patch(channels):
    grid = (2, 3)                                                  # patches of 3 x 4
    picture = np.random.default_rng(0).random((6, 12, *channels)) * 0.4
    for place in range(6):
        row, column = divmod(place, 3)
        cut = surroundings(picture, place, grid)
        assert cut.shape == (9, 12, *channels)
        patch = picture[3 * row:3 * row + 3, 4 * column:4 * column + 4]
        assert np.array_equal(cut[3:6, 4:8], patch)
        assert (cut == 1).all(axis=tuple(range(2, cut.ndim))).sum() == 5 * 6 - 3 * 4
        assert (cut[2, 3:9] == 1).all() and (cut[2:7, 8] == 1).all()
    assert (surroundings(picture, 0, grid)[:2] == 0.5).all()       # beyond the edge


def test_to_pictures_undoes_the_standardisation():
    colour = torch.rand(2, 3, 4, 6)
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    standardised = (colour - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    for shown, image in zip(to_pictures(standardised, mean, std), colour, strict=True):
        np.testing.assert_allclose(shown, image.permute(1, 2, 0), atol=1e-6)
    grey = to_pictures(torch.full((1, 1, 4, 6), 9.0), [0.5], [0.2])
    assert grey[0].shape == (4, 6) and grey[0].max() == 1


def test_mosaic_magnifies_to_the_largest():
    figure, axis = pictures.plt.subplots()
    mosaic(axis, {"grey": [np.zeros((8, 8)), np.zeros((8, 8))], "small": [np.full((4, 4, 3), 0.5)]})
    sheet = axis.images[0].get_array()
    pictures.plt.close(figure)
    assert sheet.shape == (17, 17, 3)
    assert (sheet[:8, :8] == 0).all() and (sheet[:8, 9:] == 0).all()
    assert (sheet[9:, :8] == 0.5).all() and (sheet[9:, 9:] == 1).all()


def records(labels):
    """The log of a run of two lines and two looks."""
    log = [dict(step=step, epoch=step / 4, knn_class=0.3, knn_mean=0.4) for step in (0, 8)]
    for step in (4, 8):
        record = dict(step=step, epoch=step / 4, loss=4.0, rec=0.7, rec_constant=0.9)
        for name in labels:
            record |= {name: 1.5, f"{name}_ln_k": math.log(16), f"{name}_entropy": 1.0,
                       f"{name}_effective": 12.0}
        log.append(record)
    return log


@pytest.mark.parametrize("labels", [(), ("image",), ("image", "patch")])
def test_curves_of_few_records(labels, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(pictures, "save", lambda figure, path: drawn.append(figure))
    curves(records(labels), None)
    monkeypatch.undo()
    axes = drawn[0].axes
    legends = [text.get_text() for axis in axes for text in axis.get_legend().texts]
    assert len(axes) == (3 if labels else 2)
    for name in ("image", "patch"):
        assert (f"{name} pseudo labels" in legends) == (name in labels)
        assert (f"ln K ({name})" in legends) == (name in labels)
    assert "best constant" in legends and "class token" in legends and "consistency" not in legends
    pictures.save(drawn[0], tmp_path / "curves.png")
    assert matplotlib.image.imread(tmp_path / "curves.png").std() > 0


@pytest.mark.parametrize("log, panels", [
    ([], 1), ([dict(step=0, epoch=0)], 1), (records(["image"])[2:], 2)])
def test_curves_without_labelled_images_or_losses(log, panels, tmp_path):
    """A panel that would be empty is left out."""
    curves(log, tmp_path / "curves.png")
    assert [file.name for file in tmp_path.iterdir()] == ["curves.png"]
    assert matplotlib.image.imread(tmp_path / "curves.png").shape[1] == 550 * panels


def test_clusters_of_either_kind(tmp_path):
    images = (torch.randint(0, 3, (6,)), torch.rand(6), {})
    patches = (torch.randint(0, 3, (4, 4)), torch.rand(4, 4), {2: "cluster 2: 60% star"})
    widths = []
    for found in ({"image": images}, {"patch": patches}, {"image": images, "patch": patches}):
        pictures.clusters(found, flat_pictures(6), (2, 2), tmp_path / "clusters.png")
        widths.append(matplotlib.image.imread(tmp_path / "clusters.png").shape[1])
    assert widths[0] == widths[1] == widths[2] / 2


# ------------------------------------------------------------------------------------- evaluations

@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """The figure that is saved, kept open; the path to give."""
    figures = []
    monkeypatch.setattr(pictures, "save", lambda figure, path: figures.append(figure))
    yield figures, tmp_path / "x.png"
    for figure in figures:
        pictures.plt.close(figure)


def test_few_labels_are_drawn_by_their_number_and_in_per_cent(drawn):
    figures, path = drawn
    texts, images = ["1", "5", "1%", "10%", "all"], [10, 50, 20, 200, 2000]
    draw_few({"net": (texts, images, [0.1, 0.3, 0.2, 0.4, 0.5], [0.01, 0.02, 0, 0, 0])}, "accuracy",
             0.1, path)
    [axis] = figures[0].axes
    each, shares = (line.get_xydata().tolist() for line in axis.lines if len(line.get_xdata()) > 1
                    and line.get_marker() == "o")
    assert each == [[10, 10], [50, 30]]
    assert np.allclose(shares, [[20, 20], [200, 40], [2000, 50]])
    assert [label.get_text() for label in axis.get_xticklabels()] == [
        "1 each (10)", "5 each (50)", "1% (20)", "10% (200)", "all (2000)"]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["guessing", "net"]


def test_neighbours_have_their_captions(drawn):
    figures, path = drawn
    captions = [("dog", "black"), ("dog", "green"), ("cat", "red")]
    draw_neighbours([list(zip(flat_pictures(3), captions)),
                     list(zip(flat_pictures(2), captions))], "net", path)
    titles = [(axis.get_title(), axis.title.get_color()) for axis in figures[0].axes]
    assert titles[:5] == captions + captions[:2] and titles[5][0] == ""
    shown = [axis.images[0].get_array()[0, 0] for axis in figures[0].axes[:5]]
    assert shown == pytest.approx([0, 0.01, 0.02, 0, 0.01])


def test_lines_of_few_steps_are_not_drawn():
    def steps(*numbers):
        return [dict(step=step) for step in numbers]

    assert pictures.whole_lines(steps(50, 100, 101, 151, 152)) == steps(50, 100, 151)
    for few in (steps(), steps(7), steps(7, 9)):
        assert pictures.whole_lines(few) == few


def test_points_have_the_colour_of_their_class(drawn):
    figures, path = drawn
    labels = torch.tensor([1, 0, 1, -1])
    points = torch.arange(8.0).view(4, 2)
    draw_components(points, [0.5, 0.2], labels, ["cat", "dog"], "net", path)
    others, cat, dog = (each.get_offsets().tolist() for each in figures[0].axes[0].collections)
    assert others == [[6, 7]] and cat == [[2, 3]] and dog == [[0, 1], [4, 5]]
    assert "first principal component (50%" in figures[0].axes[0].get_xlabel()
