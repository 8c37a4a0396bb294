"""play.ipynb runs from top to bottom, with a run's log and without, with no network."""

import nbformat
import pytest
from conftest import ROOT, TINY, main
from nbclient import NotebookClient

PNG = b"\x89PNG"


def execute(directory, monkeypatch):
    """Run the notebook in a directory; returns its outputs as text. An error in any cell is raised."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(ROOT / "play.ipynb", as_version=4)
    training = next(cell for cell in notebook.cells if "--max_steps 150" in cell.source)
    quick = "--max_steps 30 --total_batch_size 256"
    training.source = training.source.replace("--max_steps 150", quick)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(directory)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 11
    return "".join(output.get("text", "") for output in outputs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_the_notebook_runs_without_a_log(tmp_path, monkeypatch):
    said = execute(tmp_path, monkeypatch)
    assert "log_play/model_00030.pt: GPTConfig" in said and "HellaSwag was not evaluated" in said
    assert (tmp_path / "log_play" / "run.png").read_bytes().startswith(PNG)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_the_notebook_runs_with_the_lectures_log_and_another_run(shards, tmp_path, monkeypatch):
    """The lecture's script writes no config.json, and only the streams train, val and hella."""
    flags = ["--data", shards, *TINY, "--max_steps", 30, "--val_every", 10]
    main(*flags, "--log_dir", tmp_path / "log_other")
    (tmp_path / "log").mkdir()
    with open(tmp_path / "log" / "log.txt", "w") as f:
        for step in range(60):
            f.write(f"{step} val 10.0\n{step} hella 0.25\n" if step % 20 == 0 else "")
            f.write(f"{step} train {11 - step / 10:.6f}\n")
    assert "random weights: GPTConfig" in execute(tmp_path, monkeypatch)
    for name in "run.png", "runs.png":
        assert (tmp_path / "log" / name).read_bytes().startswith(PNG)


def test_the_notebook_is_committed_with_outputs_and_without_paths_of_a_machine():
    file = ROOT / "play.ipynb"
    assert file.stat().st_size <= 600_000
    cells = nbformat.read(file, as_version=4).cells
    assert all(cell.execution_count for cell in cells if cell.cell_type == "code")
    assert all(len(cell.source.splitlines()) <= 40 for cell in cells)
    assert not any(word in file.read_text() for word in ("/tmp", "/work", "/home", "/root", "/Users"))
