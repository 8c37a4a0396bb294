"""play.ipynb runs from top to bottom, with a run's log and without, with no network."""

import shutil

import nbformat
import pytest
from conftest import ROOT, TINY, succeed
from nbclient import NotebookClient

PNG = b"\x89PNG"


def execute(directory, monkeypatch):
    """Run the notebook in a directory; returns its outputs as text. An error in any cell is raised."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook = nbformat.read(ROOT / "play.ipynb", as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(directory)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 9
    return "".join(output.get("text", "") for output in outputs)


@pytest.mark.filterwarnings("ignore")
def test_without_a_log(tmp_path, monkeypatch):
    said = execute(tmp_path, monkeypatch)
    assert said.count("hub can't be reached") == 1 and "log_play" in said
    assert (tmp_path / "log_play" / "run.png").read_bytes().startswith(PNG)


@pytest.mark.filterwarnings("ignore")
def test_with_a_run_and_the_lectures_log(shards, tmp_path, monkeypatch):
    """The lecture's script writes no config.json, and only the streams train, val and hella."""
    flags = ["--data", shards, *TINY, "--T", 128, "--B", 1, "--max_steps", 30, "--val_every", 10]
    succeed(*flags, "--log_dir", tmp_path / "log")
    (tmp_path / "log_lecture").mkdir()
    lines = [f"{step} train {11 - step / 10:.6f}" for step in range(60)]
    lines += [f"{step} {stream} {value:.4f}" for step in range(0, 60, 20) for stream, value in (("val", 10.0), ("hella", 0.25))]
    (tmp_path / "log_lecture" / "log.txt").write_text("\n".join(sorted(lines, key=lambda line: int(line.split()[0]))) + "\n")
    execute(tmp_path, monkeypatch)
    for name in "run.png", "runs.png":
        assert (tmp_path / "log" / name).read_bytes().startswith(PNG)
    shutil.rmtree(tmp_path / "log")
    (tmp_path / "log_lecture").rename(tmp_path / "log")
    execute(tmp_path, monkeypatch)
    assert (tmp_path / "log" / "run.png").read_bytes().startswith(PNG)


def test_committed_with_outputs_and_without_paths_of_a_machine():
    file = ROOT / "play.ipynb"
    assert file.stat().st_size < 1.5e6
    code = [cell for cell in nbformat.read(file, as_version=4).cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    assert not any(word in file.read_text() for word in ("/tmp", "/work", "/home", "/root", "/Users"))
