"""Stand-ins for real data without a network: drawn digits and the Python manual."""

from __future__ import annotations

import pydoc_data.topics
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Their names in results.
MANUAL_NAME = "Python manual (stand-in)"
DIGITS_NAME = "drawn digits (stand-in)"
FONTS = (
    "DejaVuSans DejaVuSans-Bold DejaVuSans-Oblique DejaVuSansMono DejaVuSansMono-Bold DejaVuSerif"
    " DejaVuSerif-Bold DejaVuSerif-Italic STIXGeneral STIXGeneralBol STIXGeneralItalic cmr10 cmb10"
    " cmss10 cmtt10"
).split()  # matplotlib's fonts that have digits


def python_manual() -> str:
    """The topics of Python's help(), as one text."""
    return "\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))


def drawn_digits(count: int) -> tuple[Tensor, Tensor]:
    """The first count digits of an endless sequence, like CIFAR-10: (count, 3, 32, 32) uint8 and
    labels (count,). They come in many fonts, rotated, warped and coloured, over clutter. Light on
    dark is as frequent as dark on light, so no linear classifier can read them."""
    glyphs = draw_glyphs()
    starts = range(0, count, 5000)
    parts = [_draw_images(glyphs, min(5000, count - x), i) for i, x in enumerate(starts)]
    images, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    return images, labels


def draw_glyphs(size: int = 48) -> Tensor:
    """Every digit in every font, (fonts, 10, size, size), 1 where there is ink."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    figure = Figure(figsize=(10 * size / 72, len(FONTS) * size / 72), dpi=72)
    for row, font in enumerate(FONTS):
        for digit in range(10):
            x, y = (digit + 0.5) / 10, 1 - (row + 0.5) / len(FONTS)
            style = {"font": folder / f"{font}.ttf", "fontsize": 0.7 * size}
            figure.text(x, y, str(digit), ha="center", va="center_baseline", **style)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = torch.from_numpy(np.array(canvas.buffer_rgba())[..., 0])
    ink = 1 - pixels.float() / 255
    return ink.view(len(FONTS), size, 10, size).transpose(1, 2)


def _draw_images(glyphs: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """count images (count, 3, 32, 32) uint8 and their digits (count,)."""
    options = {"generator": torch.Generator("cpu").manual_seed(seed), "device": "cpu"}
    float_options = options | {"dtype": torch.float32}

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(count, *shape, **float_options)

    def smooth_noise(cells):  # a coarse grid of noise, resized to the image
        coarse = torch.randn(count, 3, cells, cells, **float_options)
        return F.interpolate(coarse, size=(32, 32), mode="bicubic", align_corners=True)

    def draw_ink(digits, max_shift, scale_range, max_angle):
        """Ink (count, 1, 32, 32) of digits in random fonts, shifted, scaled, rotated and warped."""
        fonts = torch.randint(len(glyphs), (count,), **options)
        angle, size = uniform(-max_angle, max_angle), uniform(*scale_range)
        cos, sin = angle.cos() / size, angle.sin() / size
        x, y = uniform(-max_shift, max_shift), uniform(-max_shift, max_shift)
        affine = torch.stack([cos, -sin, x, sin, cos, y], dim=1).view(count, 2, 3)
        grid = F.affine_grid(affine, (count, 1, 32, 32), align_corners=False)
        grid = grid + 0.06 * smooth_noise(4)[:, :2].movedim(1, -1)
        return F.grid_sample(glyphs[fonts, digits][:, None], grid, align_corners=False)

    labels = torch.randint(10, (count,), **options)
    images = uniform(0.1, 0.9, 3, 1, 1) + 0.12 * smooth_noise(5)
    for _ in range(3):  # clutter: faint pieces of larger, off-centre digits
        digits = torch.randint(10, (count,), **options)
        ink = draw_ink(digits, max_shift=1.6, scale_range=(0.6, 1.6), max_angle=3.1)
        images = images + uniform(-0.35, 0.35, 3, 1, 1) * ink
    ink = draw_ink(labels, max_shift=0.25, scale_range=(0.7, 1.1), max_angle=0.45)
    sign = uniform(-1, 1, 1, 1, 1).sign()  # lighter or darker than the background
    images = images + sign * uniform(0.3, 0.7, 3, 1, 1) * ink
    images = images + 0.03 * torch.randn(images.shape, **float_options)
    return (images.clamp(0, 1) * 255).to(torch.uint8), labels
