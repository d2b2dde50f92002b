"""The drawn digits: shaped like CIFAR-10, and readable, but not by a linear classifier."""

from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from scripts import assert_independent_of_defaults

from nala_min import data, synthetic


@pytest.fixture(scope="module")
def digits():
    return data.drawn_images(5000, 1000)


def test_drawn_digits_have_the_shape_of_cifar10(digits):
    assert digits.name == synthetic.DIGITS_NAME
    assert digits.classes == tuple("0123456789")
    assert not digits.mirror  # a mirrored 2 is not a 2
    for (pictures, labels), count in ((digits.train, 5000), (digits.test, 1000)):
        assert pictures.shape == (count, 3, 32, 32) and pictures.dtype == torch.uint8
        assert labels.shape == (count,) and labels.dtype == torch.int64
        shares = torch.bincount(labels, minlength=10) / count
        assert len(shares) == 10
        assert shares.min() > 0.07 and shares.max() < 0.13


def test_drawn_digits_are_always_the_same(digits):
    torch.manual_seed(123)  # must have no effect
    assert data.drawn_images(5000, 1000).sha256 == digits.sha256


def test_digits_are_tested_in_fonts_that_are_not_trained_on(monkeypatch):
    fonts = []
    drawn = Mock(side_effect=lambda count, numbers, seed: fonts.append([*numbers]))
    monkeypatch.setattr(data, "drawn_digits", drawn)
    data.drawn_images()
    assert sorted([*fonts[0], *fonts[1]]) == list(range(len(synthetic.FONTS)))
    assert [call.args[0] for call in drawn.mock_calls] == [20_000, 4_000]


def test_drawn_digits_do_not_depend_on_torch_s_defaults():
    def make():
        images = data.drawn_images(7, 3)
        return [*images.train, *images.test]

    assert_independent_of_defaults(make)


def test_no_drawn_image_occurs_twice(digits):
    pictures = torch.cat([digits.train[0], digits.test[0]]).flatten(1).numpy()
    assert len({picture.tobytes() for picture in pictures}) == 6000


def test_drawn_images_have_contrast_and_colour(digits):
    pictures = digits.test[0].float()
    assert pictures.flatten(1).std(dim=1).min() > 5
    assert pictures.std(dim=1).mean() > 10  # over red, green and blue at each pixel
    assert 90 < pictures.mean() < 165
    assert 30 < pictures.std() < 90


def test_every_glyph_has_ink_and_a_margin_and_differs_from_the_others_in_its_font():
    glyphs = synthetic.draw_glyphs()
    assert glyphs.shape == (len(synthetic.FONTS), 10, 48, 48)
    assert glyphs.min() == 0 and glyphs.max() == 1
    ink = glyphs.sum(dim=(2, 3))
    assert ink.min() > 50 and ink.max() < 48 * 48 / 4
    edges = [glyphs[:, :, [0, -1]], glyphs[:, :, :, [0, -1]]]
    assert all(edge.max() == 0 for edge in edges)  # no part of a neighbour
    flat = glyphs.flatten(2)
    distances = torch.cdist(flat, flat, p=1)  # (fonts, 10, 10)
    assert (distances + 1000 * torch.eye(10)).min() > 25
    fonts = glyphs.flatten(1)
    assert (torch.cdist(fonts, fonts, p=1) + 1000 * torch.eye(len(fonts))).min() > 25


def test_every_glyph_shows_its_digit():
    """In every font, the 6 upside down is closest to the 9, and the 1 or 7 has the least ink."""

    def cut_out(glyph):
        rows, columns = (glyph.sum(dim=i).nonzero() for i in (1, 0))
        glyph = glyph[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        return F.interpolate(glyph[None, None], size=(24, 16), mode="area").flatten()

    for font in synthetic.draw_glyphs():
        shapes = torch.stack([cut_out(glyph) for glyph in font])
        six = cut_out(font[6].flip(0, 1))
        assert (shapes - six).abs().sum(dim=1).argmin() == 9
        assert font.sum(dim=(1, 2)).argmin() in (1, 7)


def linear_accuracy(features, digits):
    """Test accuracy of ridge regression on features of the training images."""
    parts = digits.train, digits.test
    training, test = (features(pictures.float()).flatten(1) for pictures, _ in parts)
    training, test = ((x - training.mean(dim=0)) / training.std() for x in (training, test))
    targets = F.one_hot(digits.train[1], 10) - 0.1
    ridge = 1000 * torch.eye(training.shape[1])
    weights = torch.linalg.solve(training.T @ training + ridge, training.T @ targets)
    return ((test @ weights).argmax(dim=1) == digits.test[1]).float().mean().item()


def test_no_linear_classifier_of_pixels_reads_drawn_digits(digits):
    """Otherwise they would say nothing about attention. Light on dark alone would give 24 %."""
    assert linear_accuracy(lambda pictures: pictures.mean(dim=1), digits) < 0.19


def test_drawn_digits_show_their_labels(digits):
    """Edges, the same for light on dark and dark on light, suffice to read many."""

    def edges(pictures):
        grey = pictures.mean(dim=1)
        across = grey[:, 1:, :-1] - grey[:, :-1, :-1]
        along = grey[:, :-1, 1:] - grey[:, :-1, :-1]
        strokes = torch.stack([across, along, across + along, across - along], dim=1)
        return F.avg_pool2d(strokes.abs(), kernel_size=3, stride=2)

    assert linear_accuracy(edges, digits) > 0.45
