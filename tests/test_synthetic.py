"""The stand-ins: the Python manual, and drawn digits, which no linear classifier reads."""

from itertools import product
from unittest.mock import Mock, call

import torch

from nala_min import data, synthetic


def test_digits_are_tested_in_fonts_that_are_not_trained_on(monkeypatch):
    monkeypatch.setattr(data, "drawn_digits", drawn := Mock())
    digits = data.drawn_images()
    assert (digits.name, digits.mirror) == ("drawn digits (stand-in)", False)
    assert digits.classes == tuple("0123456789")
    training, test = call(20_000, range(12), seed=0), call(4_000, range(12, 15), seed=1)
    assert drawn.mock_calls == [training, test] and len(synthetic.FONTS) == 15


def test_digits_are_light_on_dark_as_often_as_dark_on_light_and_anywhere():
    """So no linear classifier reads them. Backgrounds are from 80 to 175, contrasts from 20 to 80,
    and shifts up to 8 pixels."""
    pictures, labels = synthetic.drawn_digits(3000, range(1), seed=0)
    assert pictures.shape == (3000, 3, 32, 32) and pictures.dtype == torch.uint8
    assert labels[:12].tolist() == [8, 6, 5, 2, 3, 0, 0, 0, 1, 8, 6, 9]  # as in earlier runs
    shares = labels.bincount() / 3000
    assert len(shares) == 10 and shares.min() > 0.08 and shares.max() < 0.12
    background = pictures[:, :, :1, :1].int()
    assert (background.min(), background.max()) == (80, 174)
    ink = pictures.int() - background
    contrast = ink.abs().amax(dim=(2, 3), keepdim=True)
    assert (contrast.min(), contrast.max()) == (20, 80)
    light = ink.sum(dim=(2, 3)) > 0
    assert (light == light[:, :1]).all() and 0.45 < light.float().mean() < 0.55
    crops = synthetic.draw_glyphs(40)[0].unfold(1, 32, 1).unfold(2, 32, 1).flatten(1, 2)
    found = []  # where the image's digit is
    for shape, label in zip((ink / contrast).abs().amax(dim=1)[:1000], labels, strict=False):
        distances = (crops[label] - shape).abs().amax(dim=(1, 2))
        assert distances.min() < 0.1
        found.append(distances.argmin().item())
    assert set(found) == set(range(9 * 9))


def test_every_glyph_shows_its_digit():
    """In every font, the 6 upside down is closest to the 9, and the 1 or 7 has the least ink. All
    have a border, so that they may be shifted."""
    glyphs = synthetic.draw_glyphs()
    assert glyphs.shape == (15, 10, 48, 48) and glyphs.min() == 0 and glyphs.max() == 1
    assert glyphs[:, :, [0, -1]].max() == 0 and glyphs[..., [0, -1]].max() == 0
    for font in glyphs:
        six = [font[6].flip(0, 1).roll(shift, (0, 1)) for shift in product(range(-4, 5), repeat=2)]
        distances = torch.stack([(font - x).abs().sum(dim=(1, 2)) for x in six]).amin(dim=0)
        assert distances.argmin() == 9
        assert font.sum(dim=(1, 2)).argmin() in (1, 7)
