"""What the tests share: tiny shards, tiny models, and the script started as a person would."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train_gpt2
from fineweb import UserError, get_tokenizer

# As in the processes that the tests start, so that results can be compared bit for bit.
torch.set_num_threads(1)
# A shell's background job ignores SIGINT, and so would what the tests start.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

TINY = "--n_layer 2 --n_head 2 --n_embd 16 --T 16 --B 2 --total_batch_size 128 --device cpu".split()
TINY += "--dtype float32 --sample_every 0 --hellaswag_every 0 --warmup_steps 2 --max_lr 1e-2".split()
# 20 steps of 8 rows: four epochs of 41.
RUN = [*TINY, *"--max_steps 20 --val_every 5 --val_tokens 150".split()]


def pytest_configure(config):
    slow = "slow: takes more than two seconds, most often because it starts a process"
    config.addinivalue_line("markers", slow)


def make_tokens(n, seed, eot=256):
    """n tokens as documents of 1 to 40 small ids, each led by eot; uint16."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 60, n)
    tokens[np.cumsum(rng.integers(2, 42, n))[: n // 42]] = eot
    tokens[0] = eot
    return tokens.astype(np.uint16)


SIZES = {"val_000000": 170, "train_000001": 325, "train_000002": 200, "train_000003": 150}


def make_shards(directory, eot):
    """Three training shards (20 + 12 + 9 rows of 16) and one of validation."""
    directory.mkdir()
    for seed, (name, n) in enumerate(SIZES.items()):
        np.save(directory / f"edufineweb_{name}.npy", make_tokens(n, seed, eot))


def make_shards_of_bytes(directory):
    """The same with tokens of bytes, and with the meta.json that fineweb.py writes."""
    make_shards(directory, 256)
    entries = {f"edufineweb_{name}.npy": {"tokens": n, "end": [0, n]} for name, n in SIZES.items()}
    meta = {"tokenizer": "bytes", "vocab_size": 257, "eot": 256, "complete": True, "shards": entries}
    (directory / "meta.json").write_text(json.dumps(meta))


def write_bin(path, tokens, magic=20240520, version=1, n=None):
    """A shard as llm.c writes it: 256 int32 of header, then the tokens."""
    header = np.zeros(256, dtype=np.int32)
    header[:3] = magic, version, len(tokens) if n is None else n
    path.write_bytes(header.tobytes() + tokens.tobytes())


@pytest.fixture
def lecture_shards(tmp_path):
    """A directory of shards as the lecture's script writes them: just the arrays, of GPT-2's tokens."""
    make_shards(tmp_path / "lecture_shards", 50256)
    return tmp_path / "lecture_shards"


@pytest.fixture
def shards(tmp_path):
    """A directory of shards of bytes, with the meta.json of fineweb.py. A small vocabulary is quick."""
    make_shards_of_bytes(tmp_path / "shards")
    return tmp_path / "shards"


def command(*flags, ranks=1):
    """The command as a person would type it."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    return [*launcher, str(ROOT / "train_gpt2.py"), *map(str, flags)]


def environment(**more):
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | more


def train(*flags, ranks=1, env={}, **options):
    """Run the script to its end; returns the CompletedProcess with stdout and stderr as text."""
    options |= {"env": environment(**env), "cwd": ROOT, "capture_output": True, "text": True, "timeout": 300}
    return subprocess.run(command(*flags, ranks=ranks), **options)


def start(*flags, until, ranks=1):
    """Start the script and come back when it has printed a line with `until`."""
    options = {"env": environment(), "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command(*flags, ranks=ranks), **options)
    for line in process.stdout:
        if until in line:
            return process
    raise AssertionError(f"ended with {process.wait()} before it printed {until!r}")


class TwoRanks:
    """Two ranks under torchrun, which start with the first job and wait for the next (see two_ranks.py)."""

    def __init__(self, directory):
        self.directory, self.number, self.process = directory, 0, None

    def launch(self):
        self.directory.mkdir(exist_ok=True)
        for path in self.directory.iterdir():
            path.unlink()
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        command = [*launcher, ROOT / "tests" / "two_ranks.py", self.directory]
        self.number, self.process = 0, subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL)

    def main(self, *flags, cwd=ROOT, stop=None):
        """train_gpt2.main(flags) on two ranks. Returns what both print.

        stop: the step, counted from 1, in which rank 1 gets a SIGTERM."""
        if not self.process or self.process.poll() is not None:
            self.launch()
        job = self.directory / f"job_{self.number}.json"
        answers = [job.with_name(f"{job.stem}_rank{rank}.txt") for rank in (0, 1)]
        part = job.with_suffix(".part")
        task = {"flags": [str(flag) for flag in flags], "cwd": str(cwd), "stop": stop, "port": free_port()}
        part.write_text(json.dumps(task))
        part.rename(job)
        deadline = time.monotonic() + 200
        while not all(answer.exists() for answer in answers) and self.process.poll() is None:
            assert time.monotonic() < deadline, "the ranks do not answer"
            time.sleep(0.01)
        said = "".join(answer.read_text() for answer in answers if answer.exists())
        assert self.process.poll() is None and "Traceback" not in said, said
        self.number += 1
        return said


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory):
    ranks = TwoRanks(tmp_path_factory.mktemp("two_ranks"))
    yield ranks
    if ranks.process:
        ranks.process.terminate()
        ranks.process.wait()


def main(*flags):
    """The command in this process."""
    train_gpt2.main([str(flag) for flag in flags])


@contextlib.contextmanager
def interrupt(name, call, number):
    """Send a signal to this process within the call-th call of a function of train_gpt2."""
    function, calls = getattr(train_gpt2, name), []

    def interrupted(*args, **options):
        calls.append(name)
        if len(calls) == call + 1:
            os.kill(os.getpid(), number)
        return function(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt2, name, interrupted)
        yield


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


needs_bpe = pytest.mark.skipif(
    not has_bpe(), reason="GPT-2's merges are neither in tiktoken's cache nor to be downloaded"
)
