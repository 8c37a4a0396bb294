"""DataLoaderLite: every token once an epoch, the same rows for any split of the work, and little memory."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, make_tokens

from fineweb import UserError, find_shards
from train_gpt2 import DataLoaderLite

EOT = 50256
T = 16


def loader(shards, B=2, rank=0, world_size=1, shuffle=True, seed=7):
    return DataLoaderLite(find_shards(shards).train, B, T, rank, world_size, seed=seed, shuffle=shuffle)


def rows(batches):
    """Rows (inputs and the last target) as a list of tuples."""
    return [(*x.tolist(), y[-1].item()) for xs, ys in batches for x, y in zip(xs, ys)]


def take(source, n):
    return [source.next_batch() for _ in range(n)]


def test_targets_are_inputs_one_token_ahead(lecture_shards):
    x, y = loader(lecture_shards).next_batch()
    assert x.dtype == y.dtype == torch.int64 and x.shape == y.shape == (2, T)
    assert torch.equal(x[:, 1:], y[:, :-1])


def test_same_rows_for_any_micro_batch_and_any_number_of_ranks(lecture_shards):
    """96 rows, more than two epochs of 41: shard and epoch borders inside."""
    expected = rows(take(loader(lecture_shards, B=1), 96))
    for B, world_size in itertools.product((1, 2, 3, 8), (1, 2, 4)):
        ranks = [loader(lecture_shards, B, rank, world_size) for rank in range(world_size)]
        dealt = [rank.next_batch() for _ in range(96 // (B * world_size)) for rank in ranks]
        assert rows(dealt) == expected, (B, world_size)


def test_every_epoch_has_a_new_order_of_its_rows_which_the_seed_decides(lecture_shards):
    source = loader(lecture_shards, B=1)
    assert source.rows_per_epoch == 20 + 12 + 9
    first, second = rows(take(source, 41)), rows(take(source, 41))
    assert first != second
    assert first + second == rows(take(loader(lecture_shards, B=1), 82))  # reproducibly
    assert first != rows(take(loader(lecture_shards, B=1, seed=8), 41))


def test_every_epoch_has_an_order_of_shards_and_every_shard_an_order_of_documents():
    """Ten shards of ten documents; the tokens of document k of shard i are 100 * i + k."""
    arrays = {}
    for i in range(10):
        arrays[str(i)] = np.repeat(np.arange(11) + 100 * i, T)[: 10 * T + 1].astype(np.uint16)
        arrays[str(i)][::T] = EOT
    source = DataLoaderLite(arrays, 100, T, seed=1, shuffle=True)
    orders, shard_orders = [], []
    for _ in range(2):
        tokens = source.next_batch()[0].view(10, 10 * T).tolist()  # the rows of a shard
        shard_orders.append([max(set(row) - {EOT}) // 100 for row in tokens])
        orders += [tuple(dict.fromkeys(token % 100 for token in row if token != EOT)) for row in tokens]
    assert sorted(shard_orders[0]) == sorted(shard_orders[1]) == list(range(10))
    assert shard_orders[0] != shard_orders[1]
    assert len(set(orders)) == 20  # no two orders of documents are alike


@pytest.mark.parametrize("n, expected", [(17, 1), (32, 1), (33, 2), (48, 2)])
def test_the_last_token_of_a_shard_is_only_a_target(n, expected):
    source = DataLoaderLite({"a": make_tokens(n, 1, EOT)}, expected, T)
    assert source.rows_per_epoch == expected
    assert source.next_batch()[1].flatten().tolist() == make_tokens(n, 1, EOT)[1 : expected * T + 1].tolist()


def shuffled(tokens, seed):
    """All tokens of an array in the loader's order: rows of one token, and the target of the last one."""
    source = DataLoaderLite({"a": tokens}, len(tokens) - 1, 1, seed=seed, shuffle=True)
    x, y = source.next_batch()
    return np.append(x[:, 0], y[-1, 0])


def test_shuffling_permutes_whole_documents():
    """All tokens of a shard are read once, and each document stays in one piece."""
    tokens = make_tokens(5000, 3, EOT)
    tokens[:3] = 5  # the end of a document that began in the shard before
    after = shuffled(tokens, 0)
    assert sorted(after) == sorted(tokens)

    def documents(a):
        _piece_without_beginning, *rest = np.split(a, np.flatnonzero(a == EOT))
        return [tuple(document.tolist()) for document in rest]

    before, after = documents(tokens), documents(after)
    assert before != after
    # The piece without a beginning ends up behind some document, which then looks longer; all others stay.
    assert len(set(before) - set(after)) <= 1 and len(before) == len(after)


def test_a_row_of_any_length_is_a_slice_of_the_order():
    tokens = make_tokens(3000, 4, EOT)
    whole = shuffled(tokens, 1)
    for length in (1, 7, 40, 400, 2999):  # shorter than a document, longer than many
        x, y = DataLoaderLite({"a": tokens}, 2999 // length, length, seed=1, shuffle=True).next_batch()
        count = x.numel()
        assert np.array_equal(x.flatten(), whole[:count])
        assert np.array_equal(y.flatten(), whole[1 : count + 1])


def test_without_shuffling_the_order_is_the_lectures(lecture_shards):
    source = loader(lecture_shards, B=1, shuffle=False)
    expected = []
    for path in sorted(lecture_shards.glob("*train*")):
        tokens = np.load(path).tolist()
        expected += [tuple(tokens[i : i + T + 1]) for i in range(0, len(tokens) - T, T)]
    assert rows(take(source, 82)) == expected * 2


def test_seek_needs_no_replay(lecture_shards):
    expected = rows(take(loader(lecture_shards, B=1), 100))
    for row in (0, 30, 41, 77):
        source = loader(lecture_shards, B=4, rank=1, world_size=2)
        source.seek(row)
        assert rows(take(source, 1)) == expected[row + 4 : row + 8]


def test_the_shuffled_order_is_pinned():
    """A run that is resumed years later, with another numpy, must meet the same order: known values."""
    tokens = np.arange(40, dtype=np.uint16)
    tokens[::5] = EOT
    source = DataLoaderLite({"a": tokens}, 1, 4, seed=1337, shuffle=True)
    got = [source.next_batch()[0][0].tolist() for _ in range(3)]
    assert got == [[50256, 26, 27, 28], [29, 50256, 16, 17], [18, 19, 50256, 11]]


def test_a_last_shard_shorter_than_a_row_is_left_out(lecture_shards):
    expected = rows(take(loader(lecture_shards, B=1), 41))
    np.save(lecture_shards / "edufineweb_train_000009.npy", make_tokens(16, 9, EOT))
    source = loader(lecture_shards, B=1)
    assert source.rows_per_epoch == 41 and sorted(rows(take(source, 41))) == sorted(expected)
    with pytest.raises(UserError, match="no row of 17 tokens: lower --T"):
        DataLoaderLite({"short": make_tokens(16, 9, EOT)}, 1, T)


@pytest.mark.slow
def test_memory_stays_at_about_three_shards(tmp_path):
    """Four shards of 40 MB: one as it is mapped, the same in the order of an epoch, and the one before."""
    n = 20_000_000
    for i in range(5):
        tokens = np.full(n, i, dtype=np.uint16)
        tokens[::1000] = EOT
        np.save(tmp_path / f"x_{'val' if i == 0 else 'train'}_{i:06d}.npy", tokens)
    code = """
import sys
from fineweb import find_shards
from train_gpt2 import DataLoaderLite
def peak():  # in MB. getrusage's would begin with the peak of pytest, which started this process
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024
shards = find_shards(sys.argv[1]).train
before = peak()
loader = DataLoaderLite(shards, 64, 1024, seed=1, shuffle=True)
for _ in range(4 * 20_000_000 // (64 * 1024)):
    loader.next_batch()
print(peak() - before)
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert 2 < float(done.stdout) / (2 * n / 2**20) < 4.3  # and 30 MB that torch and numpy need at first use
