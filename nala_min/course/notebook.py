"""Functions for the notebooks: set one up, show figures and the project's code."""

import base64
import inspect
import io
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ipywidgets
import matplotlib
import torch
from IPython.display import display
from matplotlib.figure import Figure
from PIL import Image

from nala_min import plots


def begin(seed: int = 0) -> None:
    """Set the seed, the plot style and the number of decimals, the same in every notebook."""
    torch.manual_seed(seed)
    torch.set_printoptions(precision=3, sci_mode=False, linewidth=96)
    matplotlib.rcParams.update(plots.RC_PARAMS)


def show(figure: Figure | Path, text: str) -> None:
    """Show figure, or a PNG, and, folded below it, text: what a reader who cannot see it reads."""
    png = figure.read_bytes() if isinstance(figure, Path) else _png(figure)
    size = {"alt": text, "width": round(0.64 * Image.open(io.BytesIO(png)).width)}  # 96 / 150 dpi
    bundle = {"image/png": base64.b64encode(png).decode(), "text/plain": text}
    display(bundle, metadata={"image/png": size}, raw=True)
    details = f"<details><summary>Description</summary>\n\n{text}\n\n</details>"
    display({"text/markdown": details, "text/plain": text}, raw=True)


def _png(figure: Figure) -> bytes:
    png = io.BytesIO()
    figure.savefig(png, format="png", facecolor="white")  # also readable on a dark page
    if not any(axes.images for axes in figure.axes):  # lines: 256 colours, a third of the bytes
        full_colour, png = png, io.BytesIO()
        Image.open(full_colour).convert("RGB").quantize(256).save(png, "PNG")
    return png.getvalue()


def source(*objects: Any, fold: str = "") -> None:
    """Show the code of functions and classes exactly as it runs, with docstrings.

    fold: a line to show instead; a click on it unfolds the code.
    """
    code = "\n\n\n".join(textwrap.dedent(inspect.getsource(each)).rstrip() for each in objects)
    markdown = f'<div style="font-family: monospace">\n\n```python\n{code}\n```\n\n</div>'
    if fold:
        markdown = f"<details><summary>{fold}</summary>\n\n{markdown}\n\n</details>"
    display({"text/markdown": markdown, "text/plain": code}, raw=True)


def slider(draw: Callable[[float], Figure], low: float, high: float, start: float) -> None:
    """Show a slider from low to high and the figure draw(position) while the notebook runs."""
    knob = ipywidgets.FloatSlider(start, min=low, max=high, step=(high - low) / 100)
    knob.description = next(iter(inspect.signature(draw).parameters))
    figure = draw(start)
    picture = ipywidgets.Image(value=_png(figure), width=round(96 * figure.get_figwidth()))
    knob.observe(lambda change: picture.set_trait("value", _png(draw(change.new))), "value")
    live = ipywidgets.VBox([knob, picture])._repr_mimebundle_()
    text = "A slider appears here while the notebook runs; the figure above is a static version."
    display(live | {"text/plain": text}, raw=True)
