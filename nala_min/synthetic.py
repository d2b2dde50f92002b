"""Stand-ins for real data without a network: drawn digits and the Python manual."""

import pydoc_data.topics
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

MANUAL_NAME = "Python manual (stand-in)"  # in results
DIGITS_NAME = "drawn digits (stand-in)"
FONTS = (
    "DejaVuSans DejaVuSans-Bold DejaVuSans-Oblique DejaVuSansMono DejaVuSansMono-Bold DejaVuSerif"
    " DejaVuSerif-Bold DejaVuSerif-Italic STIXGeneral STIXGeneralBol STIXGeneralItalic cmr10 cmb10"
    " cmss10 cmtt10"
).split()  # matplotlib's fonts that have digits


def python_manual() -> str:
    """The topics of Python's help(), as one text."""
    return "\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))


def draw_glyphs(size: int = 48) -> Tensor:
    """Every digit in every font, (fonts, 10, size, size), 1 where there is ink."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    figure = Figure(figsize=(10 * size / 72, len(FONTS) * size / 72), dpi=72)
    style = {"fontsize": 0.7 * size, "ha": "center", "va": "center_baseline"}
    for row, font in enumerate(FONTS):
        for digit in range(10):
            x, y = (digit + 0.5) / 10, 1 - (row + 0.5) / len(FONTS)
            figure.text(x, y, str(digit), font=folder / f"{font}.ttf", **style)
    pixels, _ = FigureCanvasAgg(figure).print_to_buffer()
    ink = 1 - torch.from_numpy(np.frombuffer(pixels, np.uint8)[::4].copy()).float() / 255
    return ink.view(len(FONTS), size, 10, size).transpose(1, 2)


def drawn_digits(count: int, fonts: range, seed: int) -> tuple[Tensor, Tensor]:
    """Coloured digits on coloured squares, (count, 3, 32, 32) uint8, and their labels (count,).
    Light on dark is as frequent as dark on light, so no linear classifier can read them."""
    random = np.random.default_rng(seed)
    labels, (top, left) = random.integers(10, size=count), random.integers(9, size=(2, count))
    glyphs = sliding_window_view(draw_glyphs(40).numpy(), (32, 32), axis=(2, 3))
    ink = glyphs[random.choice(fonts, count), labels, top, left][:, None]  # off-centre
    colour = random.uniform(80, 175, (count, 3, 1, 1)).astype(np.float32)
    contrast = random.choice([-1, 1], (count, 1, 1, 1)) * random.uniform(20, 80, (count, 3, 1, 1))
    images = (colour + contrast.astype(np.float32) * ink).astype(np.uint8)
    return torch.from_numpy(images), torch.from_numpy(labels)
