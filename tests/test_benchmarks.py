"""The benchmarks compute what they say; how fast is for them to tell."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT, environment


def run(name, *flags):
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / name, *map(str, flags)], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_rung_of_the_ladder_has_the_same_loss():
    """One of each kind; the vocabulary's 47 padding columns add a thousandth."""
    small = ["--device", "cpu", "--n_layer", 1, "--n_head", 2, "--n_embd", 32, "--T", 64, "--B", 2, "--steps", 1]
    rungs = "float32", "bfloat16 autocast", "freed memory kept", "all but compile", "plain eager"
    results = [json.loads(run("speed_ladder.py", *small, "--rung", rung)) for rung in rungs]
    assert all(len(result["ms"]) == 1 and result["MB"] > 0 for result in results)
    assert [result["loss"] for result in results] == pytest.approx([results[0]["loss"]] * len(rungs), abs=2e-3)


def test_learning_rates_are_compared(tmp_path):
    flags = ["--data", ROOT / "input.txt", "--lrs", 2e-3, "--seeds", 1, "--steps", 10, "--dtype", "float32"]
    said = run("learning_rate.py", *flags, "--out", tmp_path / "chart.png").splitlines()
    finals = {tuple(line.split()[:2]): float(line.split()[2]) for line in said[1:3]}
    assert finals.keys() == {("adamw", "0.002"), ("muon", "0.002")} and all(loss < 10.5 for loss in finals.values())
    assert said[1].split()[-1] == "100%"  # of its own steps
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_a_grown_model_is_compared_with_one_from_scratch(tmp_path):
    flags = ["--data", ROOT / "input.txt", "--layers", 1, 2, "--seeds", 1, "--steps", 10]
    said = run("warm_start.py", *flags, "--out", tmp_path / "chart.png").splitlines()
    losses = {line[:24].strip(): [float(word) for word in line[24:].split()] for line in said[1:4]}
    (_, before, _), (start, _, _), (fresh, _, _) = losses["1 layers"], losses["2 layers, grown"], losses["2 layers, from scratch"]
    assert abs(start - before) < 0.1 < fresh - start and "final loss of the one from scratch after" in said[4]
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
