"""Run the notebooks in fresh kernels. `python tests/tools/notebooks.py [PREFIX ...]` runs those
whose names begin with a PREFIX, or all, and writes the outputs into their files."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LIVE = "application/vnd.jupyter.widget-view+json"  # a widget: it needs a running kernel


def read(path):
    """Read and validate the notebook at path."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def slide_type(cell):
    """For `jupyter nbconvert --to slides`: headings begin a slide, text and pictures one below."""
    if cell.id in ("setup", "imports", "check"):
        return "skip"
    if cell.cell_type == "markdown":
        return "slide" if cell.source.startswith("#") else "subslide"
    return "subslide" if "notebook.show(" in cell.source else "-"


def run(path, folder):
    """Run the notebook at path from top to bottom, in folder and in a fresh kernel. Returns it."""
    notebook = read(path)
    options = {"timeout": 600, "record_timing": False, "coalesce_streams": True}
    options["resources"] = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, kernel_name="python3", **options)
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # the cores may be busy
    client.execute(env=one_thread, stderr=subprocess.DEVNULL)  # of the kernel, not of a cell
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    notebook.metadata = nbformat.from_dict(metadata)
    for cell in notebook.cells:
        cell.metadata["slideshow"] = {"slide_type": slide_type(cell)}
        for output in cell.get("outputs", []):
            output.get("data", {}).pop(LIVE, None)
    return notebook


def main():
    for path in NOTEBOOKS:
        if path.name.startswith(tuple(sys.argv[1:]) or ""):
            print(path.name)
            path.write_text(nbformat.writes(run(path, FOLDER)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
