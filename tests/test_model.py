"""The model against Hugging Face's GPT-2, hand-computed figures and the lecture's checkpoints."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, needs_bpe, train
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, GPTNeoConfig, GPTNeoForCausalLM

from fineweb import UserError
from train_gpt2 import GPT, GPTConfig

SMALL = GPTConfig(block_size=32, vocab_size=50304, n_layer=3, n_head=4, n_embd=32)
# Hugging Face has these transposed.
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


@pytest.fixture
def hf(tmp_path):
    """A small Hugging Face GPT-2, all of its tensors random, and the directory that it was saved to."""
    torch.manual_seed(1)
    shape = {"n_positions": 32, "n_embd": 32, "n_layer": 3, "n_head": 4}
    model = GPT2LMHeadModel(GPT2Config(**shape, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    model.save_pretrained(tmp_path / "hf")
    return model, tmp_path / "hf"


def test_logits_loss_and_gradients_equal_hugging_faces(hf):
    reference, directory = hf
    model = GPT.from_pretrained(directory)
    assert not model.training  # as transformers' own
    idx = torch.randint(50257, (3, 32))
    logits, loss = model(idx, idx.roll(-1, 1))
    theirs = reference(idx).logits
    torch.testing.assert_close(logits, theirs, atol=1e-5, rtol=0)
    F.cross_entropy(theirs.view(-1, 50257), idx.roll(-1, 1).view(-1)).backward()
    loss.backward()
    expected = dict(reference.named_parameters())
    for name, p in model.named_parameters():
        grad = expected[name].grad.t() if name.endswith(CONV1D) else expected[name].grad
        assert (p.grad - grad).norm() <= 1e-4 * grad.norm(), name


@needs_bpe
def test_round_trip_through_hugging_face_is_bit_exact(tmp_path):
    model = GPT(SMALL)
    model.save_pretrained(tmp_path / "out")
    reference = GPT2LMHeadModel.from_pretrained(tmp_path / "out").eval()
    assert reference.config.vocab_size == 50257 and reference.config.eos_token_id == 50256
    back = GPT.from_pretrained(tmp_path / "out")
    for name, p in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], p[:50257]), name
    idx = torch.randint(50257, (2, 32))
    torch.testing.assert_close(model.eval()(idx)[0][..., :50257], reference(idx).logits, atol=1e-5, rtol=0)


@needs_bpe
def test_an_export_is_what_the_hub_has_of_gpt2(tmp_path):
    """The files of openai-community/gpt2, and the fields that tools read. For the files of the tokenizer see
    test_fineweb.py."""
    GPT(SMALL).save_pretrained(tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json", "vocab.json", "merges.txt",
    }  # fmt: skip
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    expected = {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "activation_function": "gelu_new",
        "bos_token_id": 50256, "eos_token_id": 50256, "vocab_size": 50257, "n_ctx": 32, "n_positions": 32,
        "n_embd": 32, "n_layer": 3, "n_head": 4, "layer_norm_epsilon": 1e-5,
    }  # fmt: skip
    assert {name: config.get(name) for name in expected} == expected
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["bos_token_id"] == generation["eos_token_id"] == 50256
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["model_max_length"] == 32


def test_an_exported_model_of_bytes_comes_back_as_one(tmp_path):
    model = GPT(GPTConfig(16, 384, 1, 2, 16, 0.25, "bytes"))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (256, 256)
    assert (config["attn_pdrop"], config["resid_pdrop"], config["embd_pdrop"]) == (0.25, 0.25, 0.0)
    back = GPT.from_pretrained(tmp_path)
    assert (back.config.tokenizer, back.config.vocab_size) == ("bytes", 257)
    assert torch.equal(back.lm_head.weight, model.lm_head.weight[:257])
    assert AutoTokenizer.from_pretrained(tmp_path).encode("é\n<|endoftext|>") == [0xC3, 0xA9, 10, 256]


# config.json of distilgpt2 as released, but for the width. Those of gpt2, ... gpt2-xl have the same fields.
DISTILGPT2 = {
    "_num_labels": 1, "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1, "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256,
    "id2label": {"0": "LABEL_0"}, "initializer_range": 0.02, "label2id": {"LABEL_0": 0},
    "layer_norm_epsilon": 1e-05, "model_type": "gpt2",
    "n_ctx": 1024, "n_embd": 24, "n_head": 12, "n_layer": 6, "n_positions": 1024, "resid_pdrop": 0.1,
    "summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True,
    "summary_type": "cls_index", "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}, "vocab_size": 50257,
}  # fmt: skip


def release(directory, prefix="transformer."):
    """Write a model into the directory as the hub has it, with masks among the weights, and return it."""
    model = GPT2LMHeadModel(GPT2Config(**DISTILGPT2))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    weights = {f"{prefix}{name}": w for name, w in model.transformer.state_dict().items()}
    for i in range(6):
        weights[f"{prefix}h.{i}.attn.bias"] = torch.ones(1024, 1024).tril().view(1, 1, 1024, 1024)
    directory.mkdir(parents=True)
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(DISTILGPT2))
    return model.eval()


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_the_files_of_a_released_model_load(tmp_path, prefix):
    """gpt2 was released without the prefix, distilgpt2 with it."""
    reference = release(tmp_path / "distilgpt2", prefix)
    model = GPT.from_pretrained(tmp_path / "distilgpt2")
    assert model.config == GPTConfig(1024, 50257, 6, 12, 24)
    idx = torch.randint(50257, (2, 40))
    torch.testing.assert_close(model(idx)[0], reference(idx).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("vocab_size, name", [(50257, "gpt2"), (50304, "gpt2"), (50000, "tokenizer.json")])
def test_a_directory_with_the_vocabulary_of_gpt2_padded_or_not_has_its_tokenizer(tmp_path, vocab_size, name):
    """Any other has its own, if this script has not written down which."""
    config = GPT2Config(vocab_size=vocab_size, n_embd=8, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    expected = name if name == "gpt2" else str(tmp_path / name)
    assert GPT.from_pretrained(tmp_path).config.tokenizer == expected


@pytest.mark.parametrize(
    "dtype, max_shard_size", [(torch.float32, "50KB"), (torch.float16, "5GB"), (torch.bfloat16, "5GB")]
)
def test_weights_of_any_dtype_in_any_number_of_files_become_float32(tmp_path, dtype, max_shard_size):
    reference = GPT2LMHeadModel(GPT2Config(vocab_size=257, n_embd=32, n_layer=6, n_head=4)).to(dtype)
    reference.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (max_shard_size == "50KB")
    weights = GPT.from_pretrained(tmp_path).state_dict()
    assert weights.keys() == reference.state_dict().keys()
    for name, w in reference.state_dict().items():
        w = w.t() if name.endswith(CONV1D) else w
        assert weights[name].dtype == torch.float32 and torch.equal(weights[name], w.float()), name


@pytest.mark.slow
def test_a_name_with_an_organisation_loads(lecture_shards, tmp_path):
    """From the cache of what was downloaded, so that no network is needed."""
    repository = tmp_path / "hub" / "models--openai-community--gpt2"
    reference = release(repository / "snapshots" / "0123abcd")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abcd")
    flags = ["--data", lecture_shards, *TINY, "--init_from", "openai-community/gpt2", "--max_steps", 0]
    shape = ["--n_layer", 6, "--n_head", 12, "--n_embd", 24]
    done = train(*flags, *shape, env={"HF_HUB_CACHE": str(tmp_path / "hub")})
    assert done.returncode == 0, done.stderr
    val = torch.from_numpy(np.load(lecture_shards / "edufineweb_val_000000.npy").astype(np.int64))[:161]
    logits = reference(val[:160].view(10, 16)).logits
    loss = F.cross_entropy(logits.flatten(0, 1), val[1:]).item()
    assert float(re.search(r"val (\S+)", done.stdout)[1]) == pytest.approx(loss, abs=1e-3)


@pytest.mark.parametrize(
    "field, value",
    [("activation_function", "relu"), ("layer_norm_epsilon", 1e-6), ("scale_attn_weights", False),
     ("scale_attn_by_inverse_layer_idx", True), ("tie_word_embeddings", False), ("n_inner", 32)],
)  # fmt: skip
def test_variants_of_gpt2_are_refused_by_their_field(tmp_path, field, value):
    GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, **{field: value})).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"{field} is {value}"):
        GPT.from_pretrained(tmp_path)


def test_a_directory_without_one_of_the_weights_is_refused(hf):
    """transformers would fill it with random numbers."""
    weights = load_file(hf[1] / "model.safetensors")
    del weights["transformer.h.1.mlp.c_fc.bias"]
    save_file(weights, hf[1] / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="transformer.h.1.mlp.c_fc.bias is missing"):
        GPT.from_pretrained(hf[1])


def test_another_architecture_is_refused(tmp_path):
    shape = {"hidden_size": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 64}
    config = GPTNeoConfig(**shape, attention_types=[[["global"], 1]])
    GPTNeoForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="can't be read"):
        GPT.from_pretrained(tmp_path)


def test_decayed_parameters_are_those_of_the_lecture():
    with torch.device("meta"):
        [optimizer] = GPT(GPTConfig(vocab_size=50304)).configure_optimizers(6e-4, 0.1)
    decayed, rest = optimizer.param_groups
    assert (len(decayed["params"]), sum(p.numel() for p in decayed["params"])) == (50, 124_354_560)
    assert (len(rest["params"]), sum(p.numel() for p in rest["params"])) == (98, 121_344)
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)


def test_every_tensor_begins_as_in_the_lecture():
    """Normal with a standard deviation of 0.02, where a sum is added to the residual stream of
    0.02 / sqrt(2 * 8 layers) = 0.005. Biases are 0, and the weights of norms 1."""
    model = GPT(GPTConfig(block_size=256, vocab_size=512, n_layer=8, n_head=4, n_embd=128))
    assert model.lm_head.weight is model.transformer.wte.weight
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif ".ln_" in name:
            assert (p == 1).all(), name
        else:
            std = 0.005 if name.endswith("c_proj.weight") else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.03), name
            assert abs(p.mean().item()) < 5 * std / math.sqrt(p.numel()), name
    _, loss = model(torch.randint(512, (4, 64)), torch.randint(512, (4, 64)))
    assert loss.item() == pytest.approx(math.log(512), abs=0.1)


def test_the_mlp_has_the_tanh_approximation_of_gelu():
    """With weights of one there are 4 * 16 hidden units of gelu(3), which is 2.9964 by the formula with tanh,
    and 2.9960 exactly."""
    mlp = GPT(GPTConfig(8, 16, 1, 1, 16)).transformer.h[0].mlp
    for layer in mlp.c_fc, mlp.c_proj:
        torch.nn.init.ones_(layer.weight)
    hidden = 0.5 * 3 * (1 + math.tanh(math.sqrt(2 / math.pi) * (3 + 0.044715 * 3**3)))
    expected = torch.full((1, 16), 64 * hidden)
    torch.testing.assert_close(mlp(torch.full((1, 16), 3 / 16)), expected, rtol=1e-5, atol=0)


def test_no_token_sees_the_future():
    model = GPT(SMALL).eval()
    idx = torch.randint(50257, (1, 32))
    changed = idx.clone()
    changed[0, 20:] = torch.randint(50257, (12,))
    a, b = model(idx)[0], model(changed)[0]
    assert torch.equal(a[:, :20], b[:, :20]) and not torch.equal(a[:, 20:], b[:, 20:])


@pytest.mark.slow
def test_overfits_one_batch():
    """The lecture's check with a smaller model: 4 x 32 tokens, 50 steps, and the loss is nearly 0."""
    torch.manual_seed(1337)
    model = GPT(GPTConfig(32, 512, 4, 4, 256))
    run = torch.randint(512, (4 * 32 + 1,))
    x, y = run[:-1].view(4, 32), run[1:].view(4, 32)
    [optimizer] = model.configure_optimizers(1e-3, 0.1)
    for _ in range(50):
        optimizer.zero_grad()
        _, loss = model(x, y)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


def test_generate_samples_the_top_k_and_never_padding():
    torch.manual_seed(0)
    model = GPT(SMALL)
    with torch.no_grad():
        model.transformer.wte.weight[50257:] = 100 * model.transformer.wte.weight[:47]  # loud padding
    idx = torch.randint(50257, (4, 30))
    out = model.generate(idx, 40, 5, torch.Generator().manual_seed(42), n_vocab=50257)
    assert out.shape == (4, 70) and torch.equal(out[:, :30], idx) and out.max() < 50257
    assert torch.equal(out, model.generate(idx, 40, 5, torch.Generator().manual_seed(42), n_vocab=50257))
    likeliest = model.eval()(out[:, :30])[0][:, -1, :50257].topk(5).indices
    assert all(out[row, 30] in likeliest[row] for row in range(4))
    greedy = model.generate(idx, 1, top_k=1, n_vocab=50257)[:, -1]
    assert torch.equal(greedy, likeliest[:, 0])


@pytest.mark.parametrize("temperature, top_k", [(1.0, 8), (0.5, 8), (2.0, 3)])
def test_draws_have_the_distribution_of_the_softmax(temperature, top_k):
    """10,000 draws, and a chi-square test with 7 or 2 degrees of freedom. Chance alone exceeds its limits
    once in 10,000 times."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(4, 8, 1, 1, 8)).eval()
    torch.nn.init.normal_(model.transformer.wte.weight, std=0.5)
    idx = torch.tensor([[3]])
    logits = model(idx)[0][0, -1].detach().double().numpy() / temperature
    logits[np.argsort(logits)[:-top_k]] = -np.inf
    expected = 10_000 * np.exp(logits) / np.exp(logits).sum()
    options = {"top_k": top_k, "generator": torch.Generator().manual_seed(0), "temperature": temperature}
    draws = np.bincount(model.generate(idx.expand(10_000, -1), 1, **options)[:, -1], minlength=8)
    likely = expected > 0
    assert not draws[~likely].any() and likely.sum() == top_k
    assert ((draws - expected)[likely] ** 2 / expected[likely]).sum() < {8: 29.9, 3: 18.4}[top_k]


def test_generate_sees_the_last_block_size_tokens():
    torch.manual_seed(0)
    model, idx = GPT(SMALL), torch.randint(50257, (1, 50))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)  # so that every token and its position matter
    long, short = model.generate(idx, 9, top_k=1), model.generate(idx[:, -32:], 9, top_k=1)
    assert torch.equal(long[:, 50:], short[:, 32:])
    with pytest.raises(AssertionError, match="33 tokens are more than block_size, 32"):
        model(idx[:, :33])


@pytest.mark.parametrize("training", [True, False])
def test_generate_leaves_mode_and_global_randomness_alone(training):
    """It samples without dropout, also from a model in training mode. A top_k above the vocabulary means all
    of it."""
    model = GPT(GPTConfig(8, 16, 1, 2, 16, dropout=0.5)).train(training)
    idx = torch.zeros(1, 1, dtype=torch.int64)
    before = torch.get_rng_state()
    draws = [model.generate(idx, 20, 1000, torch.Generator().manual_seed(42)) for _ in range(2)]
    assert torch.equal(*draws) and model.training == training
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_on_attention_weights_and_on_each_branch_and_nowhere_else(monkeypatch):
    torch.manual_seed(0)
    model, x = GPT(GPTConfig(64, 64, 1, 2, 64, dropout=0.3)), torch.randn(2, 64, 64)
    block = model.transformer.h[0]
    for module in block.attn, block.mlp:
        assert (module(x) == 0).float().mean().item() == pytest.approx(0.3, abs=0.03)
        assert not (module.eval()(x) == 0).any()
        module.train()
    # Without the dropout of the branches, attention is still random, by its weights; and nothing else is.
    monkeypatch.setattr(F, "dropout", lambda x, *others: x)
    assert not torch.equal(block.attn(x), block.attn(x)) and torch.equal(block.mlp(x), block.mlp(x))
    attention = F.scaled_dot_product_attention

    def without_dropout(*qkv, dropout_p, **options):
        return attention(*qkv, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", without_dropout)
    idx = torch.randint(64, (2, 64))
    assert torch.equal(model(idx)[0], model(idx)[0])


def test_dropout_keeps_the_mean():
    torch.manual_seed(0)
    model, x = GPT(GPTConfig(16, 64, 1, 2, 16, dropout=0.2)), torch.randn(1, 16, 16)
    block = model.transformer.h[0]
    for module in block.attn, block.mlp:
        torch.nn.init.normal_(module.c_proj.weight, std=0.3)
        many = module(x.expand(20_000, -1, -1)).mean(dim=0)
        torch.testing.assert_close(many, module.eval()(x)[0], atol=0.02, rtol=0)


def test_bfloat16_autocast_keeps_the_loss():
    torch.manual_seed(0)
    model, idx = GPT(SMALL), torch.randint(50257, (4, 33))
    _, exact = model(idx[:, :-1], idx[:, 1:])
    with torch.autocast("cpu", torch.bfloat16):
        _, loss = model(idx[:, :-1], idx[:, 1:])
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact.item(), abs=2e-3)
    assert model.bfloat16()(idx[:, :-1], idx[:, 1:])[1].dtype == torch.float32


# --------------------------------------------------------------------------------------------------
# Checkpoints of the lecture's script

LECTURE = """
import sys, torch
from dataclasses import dataclass
@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
state = torch.load(sys.argv[1], weights_only=True)
config = GPTConfig(block_size=32, vocab_size=50304, n_layer=3, n_head=4, n_embd=32)
torch.save({"model": state, "config": config, "step": 7, "val_loss": 3.25}, sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_a_checkpoint_of_the_lecture_loads(tmp_path, prefix):
    """It has a pickled GPTConfig of __main__; with torch.compile its names have a prefix."""
    model = GPT(SMALL)
    torch.save({prefix + name: w for name, w in model.state_dict().items()}, tmp_path / "state.pt")
    subprocess.run([sys.executable, "-c", LECTURE, tmp_path / "state.pt", tmp_path / "log.pt"], check=True)
    back = GPT.from_checkpoint(tmp_path / "log.pt")
    assert back.config == SMALL and not back.training
    assert all(torch.equal(w, back.state_dict()[name]) for name, w in model.state_dict().items())


def test_no_code_in_a_checkpoint_is_run(tmp_path):
    class Hostile:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    torch.save({"model": {}, "config": Hostile()}, tmp_path / "bad.pt")
    with pytest.raises(UserError, match="bad.pt can't be read"):
        GPT.from_checkpoint(tmp_path / "bad.pt")
    assert not (tmp_path / "executed").exists()


def test_checksums_of_a_checkpoint_are_verified(tmp_path):
    """One bit of a weight, which torch.load does not notice."""
    model = GPT(SMALL)
    torch.save({"model": model.state_dict(), "config": vars(SMALL)}, tmp_path / "a.pt")
    data = bytearray((tmp_path / "a.pt").read_bytes())
    place = data.index(model.transformer.wpe.weight.detach().numpy().tobytes()[:64])
    data[place] ^= 1
    (tmp_path / "a.pt").write_bytes(data)
    assert torch.load(tmp_path / "a.pt", weights_only=True)
    with pytest.raises(UserError, match="a.pt can't be read .*checksum"):
        GPT.from_checkpoint(tmp_path / "a.pt")


def test_weights_with_other_names_are_named(tmp_path):
    state = {f"module.{name}": w for name, w in GPT(SMALL).state_dict().items()}
    torch.save({"model": state, "config": vars(SMALL)}, tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"model.pt can't be read .*Missing key.*transformer.wte.weight"):
        GPT.from_checkpoint(tmp_path / "model.pt")
