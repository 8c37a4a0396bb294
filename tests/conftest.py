"""What the tests share: tiny shards, tiny models, and the script started as a person would."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train_gpt2
from fineweb import UserError, get_tokenizer

torch.set_num_threads(1)  # as in the processes that the tests start, so that results can be compared bit for bit
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # in a shell's background; what the tests start would ignore it too
    signal.signal(signal.SIGINT, signal.default_int_handler)

TINY = ["--n_layer", "2", "--n_head", "2", "--n_embd", "16", "--T", "16", "--B", "2", "--total_batch_size", "128"]
TINY += ["--device", "cpu", "--sample_every", "0", "--hellaswag_every", "0", "--warmup_steps", "2", "--max_lr", "1e-2"]


def make_tokens(n, seed, largest=60):
    """n tokens as documents of 1 to 40 small ids, each led by 50256; uint16."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, largest, n)
    tokens[np.cumsum(rng.integers(2, 42, n))[: n // 42]] = 50256
    tokens[0] = 50256
    return tokens.astype(np.uint16)


@pytest.fixture
def shards(tmp_path):
    """A directory with three training shards (20 + 12 + 9 rows of 16) and one of validation."""
    directory = tmp_path / "shards"
    directory.mkdir()
    for i, n in enumerate((325, 200, 150), start=1):
        np.save(directory / f"edufineweb_train_{i:06d}.npy", make_tokens(n, i))
    np.save(directory / "edufineweb_val_000000.npy", make_tokens(170, 0))
    return directory


def command(*flags, ranks=1):
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    return [*launcher, str(ROOT / "train_gpt2.py"), *map(str, flags)]


def environment(**more):
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | more


def train(*flags, ranks=1, env={}, cwd=ROOT, **options):
    """Run the script to its end; returns the CompletedProcess with stdout and stderr as text."""
    return subprocess.run(
        command(*flags, ranks=ranks), env=environment(**env), cwd=cwd, capture_output=True, text=True, timeout=300, **options
    )


def succeed(*flags, **options):
    done = train(*flags, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def start(*flags, until, ranks=1):
    """Start the script and come back when it has printed a line with `until`."""
    process = subprocess.Popen(
        command(*flags, ranks=ranks), env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    for line in process.stdout:
        if until in line:
            return process
    raise AssertionError(f"ended with {process.wait()} before it printed {until!r}")


def main(*flags):
    """The command in this process."""
    train_gpt2.main([str(flag) for flag in flags])


def read_log(log_dir, stream="train"):
    """{step: value} of one stream of log.txt; a step that stands there twice fails."""
    pairs = [line.split() for line in (Path(log_dir) / "log.txt").read_text().splitlines()]
    steps = [int(step) for step, name, _ in pairs if name == stream]
    assert len(steps) == len(set(steps))
    return {int(step): float(value) for step, name, value in pairs if name == stream}


def load(path):
    return torch.load(path, weights_only=True)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def has_bpe():
    try:
        return bool(get_tokenizer("gpt2"))
    except UserError:
        return False


needs_bpe = pytest.mark.skipif(not has_bpe(), reason="GPT-2's merges are neither in tiktoken's cache nor to be downloaded")
