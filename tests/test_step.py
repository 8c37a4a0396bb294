"""Training steps against the same steps written out: loss, gradient, clipping, AdamW and Muon."""

import math
import signal

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, interrupt, load, main, read_log

from train_gpt2 import GPT, GPTConfig, get_lr

T, ROWS, STEPS = 16, 8, 5  # tokens in a row, rows in a step
# Two steps of warmup to 1e-2, then half a cosine down to 1e-3 at step 5. Its steps i = 0, 1, 2 have
# 1e-3 + 9e-3 * (1 + cos(pi * i / 3)) / 2.
RATES = [5e-3, 1e-2, 1e-2, 7.75e-3, 3.25e-3]
DECAY, CLIP = 0.3, 0.5


@pytest.fixture
def text():
    return (ROOT / "input.txt").read_text()[:2000]


@pytest.fixture
def flags(text, tmp_path):
    """Five steps of 8 rows, from weights so large that the gradient is clipped."""
    (tmp_path / "text.txt").write_text(text)
    torch.manual_seed(0)
    model = GPT(GPTConfig(T, 384, 2, 2, 16, tokenizer="bytes"))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    torch.save({"model": model.state_dict(), "config": vars(model.config)}, tmp_path / "begin.pt")
    flags = ["--data", tmp_path / "text.txt", "--init_from", tmp_path / "begin.pt", "--no-shuffle"]
    flags += ["--T", T, "--B", 2, "--total_batch_size", ROWS * T, "--max_steps", STEPS, "--warmup_steps", 2]
    flags += ["--max_lr", 1e-2, "--min_lr", 1e-3, "--weight_decay", DECAY, "--grad_clip", CLIP]
    flags += ["--device", "cpu", "--dtype", "float32", "--val_every", 0, "--sample_every", 0]
    return [*flags, "--log_dir"]


def batches(text):
    """The inputs and targets of each step: of the first nine tenths of the text, led by the end of text."""
    tokens, n = torch.tensor([256, *text[: len(text) * 9 // 10].encode()]), STEPS * ROWS * T
    return zip(tokens[:n].view(STEPS, ROWS, T), tokens[1 : n + 1].view(STEPS, ROWS, T))


def adamw(p, state, grad, rate, t):
    """Loshchilov and Hutter (2019), algorithm 2, with betas 0.9 and 0.95; decay of matrices only."""
    m, v = state.get("m", 0.0), state.get("v", 0.0)
    state["m"], state["v"] = m, v = 0.9 * m + 0.1 * grad, 0.95 * v + 0.05 * grad**2
    if p.dim() >= 2:
        p -= rate * DECAY * p
    p -= rate * (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)


def written_out(model, text, muon=False, clip=CLIP):
    """Trains the model; returns the loss and the norm of each step."""
    parameters, losses, norms = dict(model.named_parameters()), [], []
    states = {name: {} for name in parameters}
    matrices = set()  # what Muon trains
    if muon:
        matrices = {n for n, p in parameters.items() if n.startswith("transformer.h.") and p.dim() == 2}
        tensors = [parameters[name] for name in sorted(matrices)]
        optimizer = torch.optim.Muon(tensors, 1.0, DECAY, adjust_lr_fn="match_rms_adamw")
    for t, ((x, y), rate) in enumerate(zip(batches(text), RATES), 1):
        loss = F.cross_entropy(model(x)[0].flatten(0, 1), y.flatten())
        grads = dict(zip(parameters, torch.autograd.grad(loss, parameters.values())))
        norm = math.sqrt(sum(grad.double().square().sum().item() for grad in grads.values()))
        losses, norms = [*losses, loss.item()], [*norms, norm]
        with torch.no_grad():
            for name, p in parameters.items():
                p.grad = grads[name] * min(1, clip / norm)
                if name not in matrices:
                    adamw(p, states[name], p.grad, rate, t)
        if muon:
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
    return losses, norms


def check(log_dir, text, begin, muon=False):
    """What training logged and saved is what the steps written out give."""
    model = GPT.from_checkpoint(begin)
    losses, norms = written_out(model, text, muon)
    assert min(norms) > CLIP and losses[-1] < losses[0]
    atol = 2e-3 if muon else 1e-5  # Muon computes in bfloat16
    assert list(read_log(log_dir).values()) == pytest.approx(losses, abs=atol)
    assert list(read_log(log_dir, "norm").values()) == pytest.approx(norms, abs=10 * atol)
    assert list(read_log(log_dir, "lr").values()) == pytest.approx(RATES, rel=1e-6)
    saved = load(log_dir / "model_00005.pt")["model"]
    for name, p in model.state_dict().items():
        parts = [saved[name], p]
        if name.endswith("c_attn.bias"):  # that of the keys moves all scores alike: its gradient is rounding
            parts = [part.view(3, -1)[[0, 2]] for part in parts]
        torch.testing.assert_close(*parts, atol=atol, rtol=0, msg=name)


def test_five_steps_of_adamw_are_those_written_out(flags, text, tmp_path):
    main(*flags, tmp_path / "log")
    check(tmp_path / "log", text, tmp_path / "begin.pt")


def test_five_steps_of_muon_are_those_written_out(flags, text, tmp_path):
    main(*flags, tmp_path / "log", "--optimizer", "muon")
    check(tmp_path / "log", text, tmp_path / "begin.pt", muon=True)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_five_steps_with_a_stop_after_the_third_are_those_written_out(flags, text, tmp_path, optimizer):
    with interrupt("training_step", 2, signal.SIGTERM):
        main(*flags, tmp_path / "log", "--optimizer", optimizer)
    assert load(tmp_path / "log" / "latest.pt")["step"] == 3
    main("--resume", "--log_dir", tmp_path / "log")
    check(tmp_path / "log", text, tmp_path / "begin.pt", muon=optimizer == "muon")


@pytest.mark.slow
@pytest.mark.parametrize("sharded", ["--no-zero", "--zero"])
def test_five_steps_on_two_ranks_are_those_written_out(flags, text, tmp_path, two_ranks, sharded):
    """Each has four micro steps on a rank. The loss is the mean over all of them, and the norm is
    that of the mean gradient, not the mean of the norms."""
    two_ranks.main(*flags, tmp_path / "log", "--B", 1, sharded)
    check(tmp_path / "log", text, tmp_path / "begin.pt")


def test_the_optimizers_have_the_settings_of_the_paper():
    """Of the GPT-3 paper, appendix B; Muon's defaults are those of torch."""
    adamw, muon = GPT(GPTConfig(8, 16, 1, 2, 16)).configure_optimizers(1e-3, 0.1, muon=True)
    assert [(g["betas"], g["eps"], g["weight_decay"]) for g in adamw.param_groups] == [
        ((0.9, 0.95), 1e-8, 0.1), ((0.9, 0.95), 1e-8, 0.0)]  # fmt: skip
    [group] = muon.param_groups
    assert (group["lr"], group["weight_decay"]) == (1e-3, 0.1)
    assert (group["momentum"], group["nesterov"]) == (0.95, True)


def test_learning_rate_at_the_steps_that_matter():
    rate = {step: get_lr(step, 6e-4, 6e-5, 715, 19073) for step in (0, 714, 715, 9894, 19073, 30000)}
    assert rate[0] == pytest.approx(6e-4 / 715)  # never 0
    assert rate[714] == rate[715] == pytest.approx(6e-4)
    assert rate[9894] == pytest.approx(3.3e-4)  # half way: the middle of 6e-4 and 6e-5
    assert rate[19073] == rate[30000] == pytest.approx(6e-5)
    assert get_lr(0, 1.0, 0.1, 0, 10) == pytest.approx(1.0)  # no warmup


def test_without_grad_clip_nothing_is_clipped(flags, text, tmp_path):
    main(*flags, tmp_path / "log", "--grad_clip", 0)
    losses, _ = written_out(GPT.from_checkpoint(tmp_path / "begin.pt"), text, clip=math.inf)
    assert list(read_log(tmp_path / "log").values()) == pytest.approx(losses, abs=1e-5)


def test_each_micro_batch_and_each_step_has_dropout_of_its_own(flags, tmp_path, monkeypatch):
    """One row again and again, with a rate of 0: whatever the loss differs by is dropout."""
    (tmp_path / "text.txt").write_text(("a" * T) * 500)
    seeds, manual_seed = [], torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda seed: seeds.append(seed) or manual_seed(seed))
    main(*flags, tmp_path / "log", "--dropout", 0.5, "--max_lr", 0, "--min_lr", 0)
    losses = list(read_log(tmp_path / "log").values())[1:]  # all rows of the first step but one are alike
    assert len({round(loss, 4) for loss in losses}) == STEPS - 1
    assert len(seeds[1:]) == len(set(seeds[1:])) == STEPS * ROWS // 2  # after the run's own seed
