"""What goes wrong in a run, or where it is resumed, ends in one line that names the thing and the mend."""

import shutil
import time

import numpy as np
import pytest
import torch
from conftest import TINY, load, main, make_tokens, read_log, train

import train_gpt2
from fineweb import UserError


def wrong_flags(capsys, *flags):
    """The line in which argparse says what is wrong with the flags."""
    with pytest.raises(SystemExit) as e:
        main(*flags)
    usage, line = capsys.readouterr().err.splitlines()
    assert e.value.code == 2 and usage.startswith("usage: ") and ": error: " in line
    return line


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_is_refused_where_there_is_none(shards, capsys):
    assert "--device cuda" in wrong_flags(capsys, "--data", shards, *TINY, "--device", "cuda")


def refused(*flags):
    with pytest.raises(UserError) as e:
        main(*flags)
    assert "\n" not in str(e.value)
    return str(e.value)


def test_a_bad_shard_met_in_mid_run_is_named(shards, tmp_path):
    """Ids are checked when a row is read. The last checkpoint goes on with a good shard."""
    bad = shards / "edufineweb_train_000003.npy"
    good = bad.read_bytes()
    np.save(bad, np.full(150, 60000, dtype=np.uint16))
    flags = ["--data", shards, *TINY, "--no-shuffle", "--max_steps", 10, "--checkpoint_every", 3]
    log_dir = tmp_path / "log"
    line = refused(*flags, "--log_dir", log_dir)
    assert str(bad) in line and "60000" in line
    assert list(read_log(log_dir)) == [0, 1, 2, 3] and load(log_dir / "latest.pt")["step"] == 3
    bad.write_bytes(good)
    main("--resume", "--log_dir", log_dir)
    assert list(read_log(log_dir)) == list(range(10))


@pytest.fixture
def run(shards, tmp_path):
    """A run of 2 steps, and the flags that resume it."""
    flags = ["--data", shards, *TINY, "--max_steps", 2, "--log_dir", tmp_path / "log"]
    main(*flags)
    return tmp_path / "log", ["--resume", "--max_steps", 4, "--log_dir", tmp_path / "log"]


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--T 8", "T was 16"),
        ("--total_batch_size 256", "total_batch_size was 128"),
        ("--n_embd 32", "has n_embd 16, not 32"),
        ("--n_layer 3", "n_layer was 2"),
        ("--optimizer muon", "optimizer was adamw"),
        ("--seed 1", "seed was 42"),
        ("--no-shuffle", "shuffle was True"),
        ("--model gpt2-xl", "model was gpt2"),
    ],
)
def test_what_a_resumed_run_cannot_change(run, flags, says):
    log_dir, resume = run
    before = (log_dir / "log.txt").read_text()
    assert says in refused(*resume, *flags.split())
    assert (log_dir / "log.txt").read_text() == before


def test_a_resumed_run_needs_the_shards_that_it_had(lecture_shards, tmp_path):
    main("--data", lecture_shards, *TINY, "--max_steps", 2, "--log_dir", tmp_path / "log")
    np.save(lecture_shards / "edufineweb_train_000002.npy", make_tokens(216, 2))  # 16 tokens more: other rows
    assert "shards was" in refused("--resume", "--max_steps", 4, "--log_dir", tmp_path / "log")


def test_a_resumed_run_needs_a_maximum_above_its_lowest_rate(shards, tmp_path, capsys):
    flags = ["--data", shards, *TINY, "--max_steps", 2, "--min_lr", 1e-3, "--log_dir", tmp_path / "log"]
    main(*flags)
    line = wrong_flags(capsys, "--resume", "--max_lr", 1e-4, "--log_dir", tmp_path / "log")
    assert "--min_lr 0.001" in line


def test_a_latest_pt_that_cannot_be_resumed_is_named(run):
    log_dir, resume = run
    good = (log_dir / "latest.pt").read_bytes()
    (log_dir / "latest.pt").unlink()
    line = refused(*resume)
    assert "latest.pt can't be read (No such file or directory): without it a run can't go on" in line
    shutil.copy(log_dir / "model_00002.pt", log_dir / "latest.pt")
    line = refused(*resume)
    assert "latest.pt can't be read (KeyError: 'args'): a new run can begin with its weights" in line
    (log_dir / "latest.pt").write_bytes(good[: len(good) // 2])
    assert "latest.pt can't be read" in refused(*resume)


def test_moments_of_a_wrong_shape_are_refused(run):
    """The fused AdamW would crash the process."""
    log_dir, resume = run
    latest = load(log_dir / "latest.pt")
    latest["optimizers"]["transformer.wte.weight"]["exp_avg"] = torch.zeros(3)
    torch.save(latest, log_dir / "latest.pt")
    line = refused(*resume)
    assert "latest.pt" in line and "(384, 16)" in line


def test_max_steps_below_the_steps_that_a_run_has_are_refused(run, capsys):
    log_dir, _ = run
    line = wrong_flags(capsys, "--resume", "--log_dir", log_dir, "--max_steps", 1)
    assert "--max_steps 1 is out of range: it must be at least 2" in line


@pytest.mark.parametrize("where, name", [(train_gpt2, "training_step"), (train_gpt2.GPT, "to")])
def test_out_of_memory_is_one_line_that_says_what_to_lower(shards, tmp_path, monkeypatch, where, name):
    """In a step, or already where the model is moved to a GPU that is full."""

    def fail(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(where, name, fail)
    line = refused("--data", shards, *TINY, "--B", 8, "--max_steps", 1, "--log_dir", tmp_path / "log")
    assert line == "out of memory with --B 8: lower --B, for the same curve, or --T"


@pytest.mark.slow
def test_under_torchrun_one_rank_prints_the_error(shards):
    for flags, line in (
        (["--T", "24"], "train_gpt2.py: error: --total_batch_size 128 is no multiple of T * ranks, 48"),
        (["--n_head", "3"], "error: n_embd 16 is not divisible by n_head 3: change one"),
    ):
        done = train("--data", shards, *TINY, *flags, ranks=2)
        assert done.returncode != 0
        beginnings = "error: ", "train_gpt2.py: error: "
        errors = [said for said in done.stderr.splitlines() if said.startswith(beginnings)]
        assert errors == [line], done.stderr


@pytest.mark.slow
def test_a_fault_that_one_rank_meets_ends_both(shards, tmp_path):
    """The third row of the first step is rank 1's. Its line is printed, and no rank waits for the other."""
    tokens = np.load(shards / "edufineweb_train_000001.npy")
    tokens[2 * 16 + 5] = 60000
    np.save(shards / "edufineweb_train_000001.npy", tokens)
    began = time.monotonic()
    flags = ["--data", shards, *TINY, "--no-shuffle", "--max_steps", 3, "--log_dir", tmp_path / "log"]
    done = train(*flags, ranks=2)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and len(lines) == 1 and "has token 60000" in lines[0]
    assert "onnection closed" not in done.stderr  # the traceback of the other rank
    assert time.monotonic() - began < 60  # it would wait for minutes


@pytest.mark.slow
def test_a_fault_that_rank_0_meets_alone_ends_both(shards, tmp_path):
    """Only rank 0 looks at log_dir, while rank 1 waits for it."""
    flags = ["--data", shards, *TINY, "--max_steps", 1, "--log_dir", tmp_path / "log"]
    main(*flags)
    done = train(*flags, ranks=2)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and len(lines) == 1 and "log has a run" in lines[0]
    assert "onnection closed" not in done.stderr


@pytest.mark.slow
def test_a_compiler_that_fails_is_one_line(shards, tmp_path):
    """torch.compile needs a C++ compiler on a CPU."""
    env = {"CXX": str(tmp_path / "no_compiler"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    flags = ["--data", shards, *TINY, "--compile", "--max_steps", 1, "--log_dir", tmp_path / "log"]
    done = train(*flags, env=env)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert any("error: " in line and "--no-compile" in line for line in done.stderr.splitlines())


@pytest.mark.slow
def test_a_character_that_the_terminal_lacks_does_not_end_a_run(shards, tmp_path):
    flags = ["--data", shards, *TINY, "--max_steps", 1, "--log_dir", tmp_path / "log"]
    done = train(*flags, "--sample_every", 1, "--prompt", "naïve", env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and "sample 0: na?ve" in done.stdout
