"""The quickstart notebook runs from top to bottom, and what it trains is better than chance and than no training."""

import ast
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "quickstart.ipynb"


# ipykernel's own, when it shuts down.
@pytest.mark.filterwarnings("ignore:For consistency across implementations:PendingDeprecationWarning")
def test_the_quickstart_runs_and_its_encoder_beats_a_random_one(tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("SIMCLR_QUICKSTART_EPOCHS", "4")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells), "clear the outputs before committing"
    notebook.cells.append(nbformat.v4.new_code_cell("accuracy, tuple(h.shape)"))
    resources = {"metadata": {"path": str(tmp_path)}}
    # Jupyter prefers the python3 kernel of the environment that asks: this one.
    nbclient.NotebookClient(notebook, kernel_name="python3", resources=resources).execute()
    accuracy, shape = ast.literal_eval(notebook.cells[-1].outputs[0]["data"]["text/plain"])
    for protocol in ("kNN", "linear"):
        assert accuracy["random"][protocol] + 0.02 < accuracy["pretrained"][protocol] <= 1
    assert shape == (1, 64)
    pictures = [o for cell in notebook.cells for o in cell.get("outputs", ()) if "image/png" in o.get("data", {})]
    assert len(pictures) == 2  # the views and the neighbours
    assert not (set(tmp_path.iterdir()) - {tmp_path / "quickstart.ckpt", tmp_path / "mine.png"})
