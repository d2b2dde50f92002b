"""Run the notebooks in fresh kernels. `python tests/tools/notebooks.py [NAME ...]` runs those whose
name begins with one of NAMES, or all, and writes what they show into their files."""

import os
import subprocess
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LIVE = "application/vnd.jupyter.widget-view+json"  # a widget: dead without its kernel


def read(path):
    """The notebook at path, checked to be a valid one."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def slide_type(cell):
    """Where a cell stands in the deck that `jupyter nbconvert --to slides` makes: a heading begins
    a slide, and other texts and pictures one below it."""
    if cell.id in ("setup", "imports", "check"):
        return "skip"
    if cell.cell_type == "markdown":
        return "slide" if cell.source.startswith("#") else "subslide"
    return "subslide" if "notebook.show(" in cell.source else "-"


def run(path, folder):
    """The notebook at path after a run from top to bottom, from folder, in a kernel of its own."""
    notebook = read(path)
    client = NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        coalesce_streams=True,
    )
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # the cores may be busy
    client.execute(env=one_thread, stderr=subprocess.DEVNULL)  # the kernel's own, not a cell's
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    for cell in notebook.cells:
        cell.metadata["slideshow"] = {"slide_type": slide_type(cell)}
        for output in cell.get("outputs", []):
            output.get("data", {}).pop(LIVE, None)
    return notebook


def main():
    for path in NOTEBOOKS:
        if path.name.startswith(tuple(sys.argv[1:]) or ""):
            start = time.perf_counter()
            notebook = run(path, FOLDER)
            path.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
            print(f"{path.name}: {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
