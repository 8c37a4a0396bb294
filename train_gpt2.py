"""
GPT-2, built, trained and judged in one file, to be read from the first line to the last: model, presets, data,
arguments, schedule, files, evaluation, training loop.

    python train_gpt2.py                                    # a small GPT-2 on input.txt, minutes on a laptop
    torchrun --nproc_per_node=8 train_gpt2.py               # GPT-2 124M on edu_fineweb10B/, eight GPUs
    torchrun --nproc_per_node=8 train_gpt2.py --resume      # go on after a stop, on any number of GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train_gpt2.py

Notable choices:
- Names are those of Hugging Face's GPT-2, so weights move over by name, in both directions.
- What can be computed from the step is not carried: learning rate, position in the data, random seeds. To resume is
  to load and begin at step k, and any number of processes trains on the same batches without talking.
- The compiled, DDP-wrapped model only trains. Validation, samples and checkpoints use the bare module, which shares its
  weights: compiling breaks nothing, and no prefix reaches a file.
- Weights and optimizer state are float32; with bfloat16, forward and loss run under autocast.
"""

import argparse
import contextlib
import ctypes
import difflib
import json
import math
import os
import pickle
import platform
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import tiktoken
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

# Who am I among the processes? torchrun says so in the environment; without it there is one process, rank 0.
RANK = int(os.environ.get("RANK", 0))  # among all processes of all nodes
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))  # among the processes of this node: which GPU is mine
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))


def print0(*args, **kwargs):
    """print on rank 0 only, at once (a pipe would hold the line back)."""
    if RANK == 0:
        print(*args, **kwargs, flush=True)


class UserError(Exception):
    """A mistake of the person's or of a file: its message names the thing and the mend, in one line."""


# ----------------------------------------------------------------------------------------------------------------------
# The model. A clean residual stream that attention and MLP read from and add to, once each in every block.

VOCAB_SIZE = 50257  # GPT-2's tokens: 50,000 merges + 256 bytes + <|endoftext|>
EOT = 50256  # <|endoftext|>, the token that begins every document
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


@dataclass
class GPTConfig:
    """The shape of a model; the defaults are GPT-2 124M as released."""

    block_size: int = 1024  # longest sequence: rows of the position embedding
    vocab_size: int = 50257  # rows of the token embedding
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0  # on attention weights and on what joins the residual stream, never on embeddings
    # What the tokens are. A tokenizer is "gpt2", "bytes", or the path of a Hugging Face tokenizer.json.
    tokenizer: str = "gpt2"
    n_tokens: int = VOCAB_SIZE  # how many there are; rows of the token embedding beyond are padding
    eot: int = EOT


class CausalSelfAttention(nn.Module):
    """Tokens communicate: each gathers from itself and the tokens before it."""

    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head:
            raise UserError(f"n_embd {config.n_embd} is not divisible by n_head {config.n_head}: change one of them")
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # query, key, value of all heads at once
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, mask=None):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for t in (q, k, v))  # (B, nh, T, hs)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None)  # flash: no (T, T) is stored
        y = y.transpose(1, 2).reshape(B, T, C)  # heads side by side again
        return F.dropout(self.c_proj(y), self.dropout, self.training)


class MLP(nn.Module):
    """Each token thinks by itself about what it gathered."""

    def __init__(self, config):
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        x = F.gelu(self.c_fc(x), approximate="tanh")  # erf was slow in 2019; kept, because GPT-2 has it
        return F.dropout(self.c_proj(x), self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, mask=None):
        x = x + self.attn(self.ln_1(x), mask)  # norms sit inside the branches (pre-norm):
        x = x + self.mlp(self.ln_2(x))  # gradients reach every layer through the sums unchanged
        return x


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019). Parameters are named as in Hugging Face's GPT2LMHeadModel."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(config.vocab_size, config.n_embd),
            "wpe": nn.Embedding(config.block_size, config.n_embd),
            "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            "ln_f": nn.LayerNorm(config.n_embd),
        })
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # tied: tokens alike in the input are alike in the output
        self.init_weights()

    def init_weights(self):
        """Normal with std 0.02 (GPT-2's code), biases 0, norms as they are: 1 and 0."""
        # Each block adds twice to the residual stream; this keeps its variance from growing with depth
        # (GPT-2 paper, section 2.3).
        residual_std = 0.02 / math.sqrt(2 * self.config.n_layer)
        for name, p in self.named_parameters():  # a tied tensor has one name here, so it is drawn once
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.dim() == 2:
                nn.init.normal_(p, std=residual_std if name.endswith("c_proj.weight") else 0.02)

    def hidden(self, idx, pos=None, mask=None):
        """
        idx: int64 (B, T), T <= block_size. Returns what the head reads: float (B, T, n_embd). HellaSwag, where four
        endings share a context, gives positions other than 0 to T - 1, int64 (B, T), and who sees whom, bool (B, 1, T, T).
        """
        if pos is None:
            if (T := idx.size(1)) > self.config.block_size:
                raise ValueError(f"sequence of {T} tokens, but block_size is {self.config.block_size}")
            pos = torch.arange(T, device=idx.device)
        x = self.transformer.wte(idx) + self.transformer.wpe(pos)
        for block in self.transformer.h:
            x = block(x, mask)
        return self.transformer.ln_f(x)

    def forward(self, idx, targets=None):
        """
        idx, targets: int64 (B, T). Returns logits (B, T, vocab_size), and the mean cross entropy in nats, a float32 scalar,
        if there are targets, else None.
        """
        logits = self.lm_head(self.hidden(idx))
        if targets is None:
            return logits, None
        # The softmax is computed in float32, because bfloat16 has three digits, too few for a loss.
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, top_k=50, generator=None, temperature=1.0):
        """
        Continue idx, int64 (B, T), each token drawn from the `top_k` likeliest, never from the vocabulary's padding;
        beyond block_size the oldest leave the context. Returns int64 (B, T + max_new_tokens).
        """
        was_training = self.training
        self.eval()
        for _ in range(max_new_tokens):
            last = self.hidden(idx[:, -self.config.block_size :])[:, -1]  # only the last position needs logits
            logits = self.lm_head(last)[:, : self.config.n_tokens].float() / temperature
            logits, candidates = logits.topk(min(top_k, logits.size(-1)))
            choice = torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)
            idx = torch.cat((idx, candidates.gather(1, choice)), dim=1)
        self.train(was_training)
        return idx

    def configure_optimizers(self, lr, weight_decay, muon=False, zero=False):
        """
        AdamW as in GPT-3 (paper, appendix B); only matrices and embeddings decay, not biases and norms. muon: the blocks'
        matrices go to Muon (Jordan et al. 2024; Liu et al. 2025, whose scale lets it share AdamW's learning rate). zero:
        each rank keeps the state of its share of the tensors, updates these and sends them to the others (Rajbhandari et
        al. 2020, stage 1). Returns a list of optimizers.
        """
        decay = [p for p in self.parameters() if p.dim() >= 2]
        rest = [p for p in self.parameters() if p.dim() < 2]
        for group, what in (decay, "decayed"), (rest, "not decayed"):
            print0(f"{what}: {len(group)} tensors, {sum(p.numel() for p in group):,} parameters")
        if muon:
            decay = [self.transformer.wte.weight, self.transformer.wpe.weight]
        groups = [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
        kinds = [(torch.optim.AdamW, groups, {"betas": (0.9, 0.95), "eps": 1e-8, "fused": True})]
        if muon:
            hidden = [p for p in self.transformer.h.parameters() if p.dim() >= 2]
            kinds.append((torch.optim.Muon, hidden, {"weight_decay": weight_decay, "adjust_lr_fn": "match_rms_adamw"}))
        if zero:
            from torch.distributed.optim import ZeroRedundancyOptimizer

            return [ZeroRedundancyOptimizer(params, kind, lr=lr, **options) for kind, params, options in kinds]
        return [kind(params, lr=lr, **options) for kind, params, options in kinds]

    @classmethod
    def from_pretrained(cls, name_or_dir):
        """
        Released weights ("gpt2", ... "gpt2-xl") or a directory that Hugging Face's save_pretrained wrote; in evaluation
        mode, as theirs.
        """
        from transformers import GPT2LMHeadModel

        hf, info = GPT2LMHeadModel.from_pretrained(name_or_dir, output_loading_info=True)
        c = hf.config
        if info["missing_keys"] or c.activation_function not in ("gelu_new", "gelu_pytorch_tanh"):
            raise UserError(f"{name_or_dir} is not a GPT-2 language model: give a released name or its directory")
        config = GPTConfig(c.n_positions, c.vocab_size, c.n_layer, c.n_head, c.n_embd)
        if c.vocab_size != VOCAB_SIZE:  # another tokenizer's
            eot = EOT if c.eos_token_id is None else c.eos_token_id
            config = replace(config, tokenizer=str(name_or_dir), n_tokens=c.vocab_size, eot=eot)
        model = cls(config)
        model.load_state_dict(transpose_conv1d(hf.float().state_dict()))
        return model.eval()

    def save_pretrained(self, directory):
        """Write Hugging Face format: config.json, safetensors and tokenizer; padding rows of the vocabulary cut off."""
        from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
        from transformers.convert_slow_tokenizer import TikTokenConverter

        c, rows = self.config, min(self.config.vocab_size, self.config.n_tokens)
        eot = c.eot if c.eot < rows else None
        dropout = {"resid_pdrop": c.dropout, "attn_pdrop": c.dropout, "embd_pdrop": 0.0}
        shape = {"n_positions": c.block_size, "n_embd": c.n_embd, "n_layer": c.n_layer, "n_head": c.n_head}
        hf = GPT2LMHeadModel(GPT2Config(vocab_size=rows, **shape, **dropout, bos_token_id=eot, eos_token_id=eot))
        state = transpose_conv1d(self.state_dict())
        state |= {name: state[name][:rows] for name in ("transformer.wte.weight", "lm_head.weight")}
        hf.load_state_dict(state)
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory) as tmp:
            hf.save_pretrained(tmp)
            tokenizer = None
            with contextlib.suppress(UserError):  # its file may be gone
                tokenizer = get_tokenizer(c.tokenizer)
            bpe = getattr(tokenizer, "bpe", None)
            if tokenizer and tokenizer.name == "gpt2":
                converter = TikTokenConverter(pattern=tokenizer._pat_str, extra_special_tokens=["<|endoftext|>"])
                converter.load_tiktoken_bpe = lambda _: tokenizer._mergeable_ranks  # it would read them from a file
                bpe = converter.converted()
            if bpe:  # AutoTokenizer.from_pretrained(directory) has the ids of training
                special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), tokenizer.decode([tokenizer.eot_token]))
                PreTrainedTokenizerFast(tokenizer_object=bpe, **special).save_pretrained(tmp)
            else:
                print0("warning: the model is saved without its tokenizer, which can't be had or exists only here")
            for path in Path(tmp).iterdir():
                os.replace(path, directory / path.name)

    @classmethod
    def from_checkpoint(cls, path):
        """The model in a .pt file that training wrote, in evaluation mode. UserError if the file is damaged."""
        checkpoint = load_checkpoint(path)
        model = cls(GPTConfig(**checkpoint["config"]))
        model.load_state_dict(checkpoint["model"])
        return model.eval()


def load_model(source):
    """
    The GPT of a .pt checkpoint, of a directory that Hugging Face's save_pretrained wrote, or of a released name.
    """
    if source.endswith(".pt"):
        return GPT.from_checkpoint(source)
    try:
        return GPT.from_pretrained(source)
    except (OSError, ValueError) as e:
        what = "no .pt file, Hugging Face directory or released name within reach"
        raise UserError(f"{source} is {what}: {str(e).splitlines()[0]}") from None


def grow(model, n_layer, dropout):
    """
    A GPT of `n_layer` layers, at least the model's L: layer j begins with the weights of its layer floor(j * L / n_layer)
    (the best of the ways to grow in depth in the Gopher paper, section G.3.3), all else as it is. The model is used up.
    """
    layers = [j * model.config.n_layer // n_layer for j in range(n_layer)]
    if n_layer > model.config.n_layer:
        print0(f"grown from {model.config.n_layer} to {n_layer} layers, which begin as {', '.join(map(str, layers))}")
    model.transformer.h = nn.ModuleList(model.transformer.h[i] for i in layers)  # repeated, not yet copied
    grown = GPT(replace(model.config, n_layer=n_layer, dropout=dropout))
    grown.load_state_dict(model.state_dict())
    return grown


def transpose_conv1d(state):
    """Hugging Face keeps four weights a block as Conv1D, (in, out), where nn.Linear has (out, in). Either direction."""
    return {name: w.t() if name.endswith(CONV1D) else w for name, w in state.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Presets: every model that has a name, and how it is trained.


def preset(
    n_layer, n_head, n_embd, T, max_lr, B, total_batch_size=2**19, max_steps=10**10 // 2**19,
    warmup_steps=375 * 10**6 // 2**19, val_every=250, hellaswag_every=250, sample_every=250, dropout=0.0, vocab_size=50304,
):  # fmt: skip
    """
    Values for the flags of these names. Rates and warmup: GPT-3 paper, table 2.1 and appendix B. max_steps: an epoch of
    10B tokens. B: a guess at what fits 80 GB. vocab_size: 50,257 padded to 128 * 393, as matrix kernels like it.
    """
    return locals()


PRESETS = {
    "gpt2": preset(12, 12, 768, 1024, 6e-4, 64),  # 124M
    "gpt2-medium": preset(24, 16, 1024, 1024, 3e-4, 32),  # 350M
    "gpt2-large": preset(36, 20, 1280, 1024, 2.5e-4, 16),  # 774M
    "gpt2-xl": preset(48, 25, 1600, 1024, 2e-4, 8, 2**20, 10**10 // 2**20, 375 * 10**6 // 2**20),  # 1558M
    "gpt3-small": preset(12, 12, 768, 2048, 6e-4, 32),
    "gpt3-medium": preset(24, 16, 1024, 2048, 3e-4, 16),
    "gpt3-large": preset(24, 16, 1536, 2048, 2.5e-4, 8),
    "gpt3-xl": preset(24, 16, 2048, 2048, 2e-4, 4, 2**20, 10**10 // 2**20, 375 * 10**6 // 2**20),  # paper: 24 heads
    # A 760M model grown from a finished 580M one. Theirs has ALiBi where these have learned positions.
    "gpt-580m": preset(18, 12, 1536, 1024, 2.5e-4, 16, max_steps=97000, warmup_steps=2000),
    "gpt-760m": preset(24, 12, 1536, 1024, 2e-4, 16, max_steps=82000, warmup_steps=2000, dropout=0.1),
    "tiny": preset(4, 4, 128, 128, 1e-3, 8, 2**10, 250, 20, 50, 0, 125),  # for a laptop
}


# ----------------------------------------------------------------------------------------------------------------------
# Data: from a text file or from shards (what fineweb.py writes) to batches of rows.


# GPT-2's vocabulary begins with the 256 bytes, those that print (in Latin-1) first: {character that is written: byte}.
BYTES = {chr(b): b for b in (*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256))}
BYTES |= {chr(256 + i): b for i, b in enumerate(sorted(set(range(256)) - set(BYTES.values())))}


def get_tokenizer(name="gpt2"):
    """
    A tiktoken.Encoding: "gpt2", which is GPT-2's BPE, or None where its merges can't be had; "bytes", the 256
    single-byte tokens of the same vocabulary, which need no download. Else name is the path of a Hugging Face tokenizer.
    """
    if name == "gpt2":
        try:
            return tiktoken.get_encoding(name)
        except OSError:  # no network, and nothing in tiktoken's cache
            return None
    if name != "bytes":
        from fineweb import HuggingFaceTokenizer

        return HuggingFaceTokenizer(name)
    # The ids in between are never made from text, but a young model samples them: give them a printable name.
    names = {f"<|{i}|>": i for i in range(256, EOT)} | {"<|endoftext|>": EOT}
    ranks = {bytes([b]): i for i, b in enumerate(BYTES.values())}
    return tiktoken.Encoding("bytes", pat_str=r"\s?\S+|\s", mergeable_ranks=ranks, special_tokens=names)


def load_text(path):
    """
    A UTF-8 text file as two shards: nine tenths of its characters to train, the last tenth to validate. As in all
    shards EOT leads every document; a file may hold several, with <|endoftext|> between them. Returns the shards of
    each split, what the tokens are (fields of GPTConfig), and how many bytes of text a token of validation stands for.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text (byte {e.start}): convert it or give another") from None
    if not (tokenizer := get_tokenizer()):
        print0("warning: GPT-2's merges can't be downloaded: the text becomes GPT-2's single-byte tokens")
        tokenizer = get_tokenizer("bytes")
    cut, splits = len(text) * 9 // 10, {}
    for split, part in ("train", text[:cut]), ("val", text[cut:]):  # `texts` and `tokens` end as validation's
        texts = part.split("<|endoftext|>")
        documents = tokenizer.encode_ordinary_batch(texts)
        tokens = np.array([t for document in documents for t in (EOT, *document)], dtype=np.uint16)
        splits[split] = {f"{path} ({split} split)": tokens}
    vocabulary = {"tokenizer": tokenizer.name, "n_tokens": VOCAB_SIZE, "eot": EOT}
    return splits, vocabulary, sum(len(text.encode()) for text in texts) / len(tokens)


def load_shard(shard, mmap_mode=None):
    """uint16 (n,) from a .npy file (mmap_mode="r": only its header for now), or an array as it is."""
    if isinstance(shard, np.ndarray):
        return shard
    try:
        tokens = np.load(shard, mmap_mode=mmap_mode)
    except (ValueError, EOFError) as e:
        raise UserError(f"{shard} is damaged ({e}): delete it and make it again") from None
    if tokens.dtype != np.uint16 or tokens.ndim != 1:
        raise UserError(f"{shard} is {tokens.ndim}-D {tokens.dtype}, a shard is 1-D uint16: make it again")
    return tokens


def find_shards(directory, val_tokens):
    """
    The .npy files with "train" and "val" in their names: training as paths, which the loader reads when their turn
    comes; of validation the `val_tokens` + 1 tokens that will be used. meta.json, which fineweb.py writes beside them,
    tells what the tokens are (else GPT-2's) and their bytes of text (else None). Returns the same three as load_text.
    """
    train, val = (sorted(Path(directory).glob(f"*{split}*.npy")) for split in ("train", "val"))
    if not train or not val:
        raise UserError(f"{directory} needs shards, one *train*.npy and one *val*.npy at least: see --data in --help")
    meta, bytes_per_token, meta_file = {"tokenizer": "gpt2"}, None, Path(directory, "meta.json")
    if meta_file.exists():
        meta = json.loads(meta_file.read_text())
        for path in train + val:
            entry = meta["shards"].get(path.name)
            if not entry or entry["tokens"] != len(load_shard(path, "r")):
                raise UserError(f"{path} is not the shard that {meta_file} tells of, its tokenizer is unknown: move it")
        if not meta["complete"]:
            print0(f"warning: {directory} is not complete: python fineweb.py goes on with it")
        entries = [meta["shards"][path.name] for path in val]
        bytes_per_token = sum(e["bytes"] for e in entries) / sum(e["tokens"] for e in entries)
    head, missing = [], val_tokens + 1
    while val and missing > 0:
        head.append(np.array(load_shard(val.pop(0), "r")[:missing]))
        missing -= len(head[-1])
    splits = {"train": {str(path): path for path in train}, "val": {f"{directory} (val split)": np.concatenate(head)}}
    name = meta["tokenizer"] if meta["tokenizer"] in ("gpt2", "bytes") else str(Path(directory, meta["tokenizer"]))
    vocabulary = {"tokenizer": name, "n_tokens": meta.get("vocab_size", VOCAB_SIZE), "eot": meta.get("eot", EOT)}
    return splits, vocabulary, bytes_per_token


class ShuffledShard:
    """A shard read as if its documents lay in another order; the tokens stay where they are."""

    def __init__(self, tokens, rng=None, eot=EOT):
        """tokens: uint16 (n,). rng: numpy Generator that draws the order; None leaves it as it is. eot: leads documents."""
        starts = np.zeros(1, dtype=np.int64)  # the head may be the end of a document that began in the shard before
        order = starts
        if rng is not None:
            chunk = 2**20  # not all at once: a mask of 100M tokens would cost 100 MB
            found = [np.flatnonzero(tokens[i : i + chunk] == eot) + i for i in range(0, len(tokens), chunk)]
            starts = np.union1d(starts, np.concatenate(found))
            order = rng.permutation(len(starts))
        lengths = np.diff(starts, append=len(tokens))[order]
        self.tokens = tokens
        self.ends = np.cumsum(lengths)  # where each document ends in the new order,
        self.shift = starts[order] - (self.ends - lengths)  # position in the shard = position in the new order + shift

    def read(self, first, count):
        """`count` tokens from position `first` of the new order: uint16 (count,)."""
        pieces = []
        document = np.searchsorted(self.ends, first, side="right")
        while count > 0:
            n = min(count, self.ends[document] - first)
            source = first + self.shift[document]
            pieces.append(self.tokens[source : source + n])
            first, count, document = first + n, count - n, document + 1
        return np.concatenate(pieces)


class DataLoaderLite:
    """
    Micro batches whose content is a function of (seed, position) alone.

    An epoch visits the shards in an order drawn from (seed, epoch) and reads the documents of each in an order drawn
    from (seed, epoch, shard), cut into rows of T tokens; a tail shorter than a row is left out. The rows of the whole
    training are numbered: row r is the same for any B and any number of ranks. Micro batches, B rows each, are dealt to
    the ranks in turn. In memory are this shard and the next, which a thread reads meanwhile.

    shards: {name: path of a .npy file, or uint16 array (n,)}. vocab_size: ids from there on are a UserError. eot: the
    id that leads documents. shuffle=False keeps shards and documents as they lie, which is the order of the lecture.
    """

    def __init__(self, shards, B, T, rank=0, world_size=1, vocab_size=VOCAB_SIZE, seed=0, shuffle=False, eot=EOT):
        self.names, self.shards = list(shards), list(shards.values())
        self.B, self.T, self.rank, self.world_size = B, T, rank, world_size
        self.vocab_size, self.seed, self.shuffle, self.eot = vocab_size, seed, shuffle, eot
        lengths = {name: len(load_shard(shard, "r")) for name, shard in shards.items()}
        for name, n in lengths.items():
            if n <= T:
                raise UserError(f"{name} has {n} tokens, a row needs T + 1 = {T + 1}: lower --T or give more data")
        self.rows = [(n - 1) // T for n in lengths.values()]  # the last token is only a target
        self.rows_per_epoch = sum(self.rows)
        self.epoch = None
        self.visits = {}  # (epoch, place) -> future of the shard that is read there
        self.thread = ThreadPoolExecutor(1)
        self.seek(0)

    def seek(self, row):
        """Let the next micro batches, over all ranks, begin at this row of the run."""
        self.row = row + self.rank * self.B

    def order(self, epoch):
        """Shards in the order of an epoch."""
        n = len(self.shards)
        return np.random.default_rng((self.seed, epoch)).permutation(n) if self.shuffle else np.arange(n)

    def prepare(self, epoch, place):
        """Read, check and shuffle a shard (in the thread)."""
        i = self.order(epoch)[place]
        tokens = load_shard(self.shards[i])
        if tokens.max() >= self.vocab_size:
            raise UserError(f"{self.names[i]}: token {tokens.max()} is not among {self.vocab_size}: see --vocab_size")
        return ShuffledShard(tokens, np.random.default_rng((self.seed, epoch, i)) if self.shuffle else None, self.eot)

    def read_row(self, row):
        """Tokens of one row of the run and the one after it: uint16 (T + 1,)."""
        epoch, row = divmod(row, self.rows_per_epoch)
        if epoch != self.epoch:
            self.epoch, self.ends = epoch, np.cumsum(np.array(self.rows)[self.order(epoch)])
        place = int(np.searchsorted(self.ends, row, side="right"))
        first = row - (int(self.ends[place - 1]) if place else 0)
        now, then = (epoch, place), (epoch, place + 1) if place + 1 < len(self.rows) else (epoch + 1, 0)
        self.visits = {v: self.visits.get(v) or self.thread.submit(self.prepare, *v) for v in (now, then)}
        return self.visits[now].result().read(first * self.T, self.T + 1)

    def next_batch(self):
        """The next B rows of this rank: inputs and targets, int64 (B, T) each, targets one token ahead."""
        rows = np.stack([self.read_row(self.row + i) for i in range(self.B)])
        self.row += self.world_size * self.B
        rows = torch.from_numpy(rows.astype(np.int64))
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


# ----------------------------------------------------------------------------------------------------------------------
# Arguments. Every knob in one place; --help is made from this list.


def flag(help, default=None, **options):
    return field(default=default, metadata={"help": help if default is None else f"{help} ({default})", **options})


SHAPE = ("n_layer", "n_head", "n_embd", "vocab_size")


@dataclass
class Args:
    """What the command line says. None: taken from what the help names in brackets."""

    data: str = flag("directory of shards, or text file (edu_fineweb10B/ where it has shards, else input.txt)")
    model: str = flag("preset, listed below (gpt2 for shards, tiny for a text file)")
    init_from: str = flag("weights to begin with: a released name, Hugging Face directory or .pt file")
    n_layer: int = flag("layers (preset); with --init_from more than it has make it grow")
    n_head: int = flag("attention heads (preset)")
    n_embd: int = flag("width (preset)")
    vocab_size: int = flag("rows of the token embedding (preset)")
    dropout: float = flag("on attention weights and on what joins the residual stream (preset)")
    B: int = flag("rows of a micro batch on one rank (preset, fewer where ranks share a small step)")
    T: int = flag("tokens of a row (the preset's context)")
    total_batch_size: int = flag("tokens of a step, over all ranks and micro steps (preset)")
    max_steps: int = flag("steps of the whole run (preset)")
    warmup_steps: int = flag("steps of rising learning rate (preset)")
    max_lr: float = flag("learning rate after warmup (preset)")
    min_lr: float = flag("learning rate at the end (max_lr / 10)")
    optimizer: str = flag("muon: for the blocks' matrices, AdamW for the rest", "adamw", choices=("adamw", "muon"))
    zero: bool = flag("shard the optimizer's state over the ranks", False)
    weight_decay: float = flag("on matrices and embeddings", 0.1)
    grad_clip: float = flag("largest global norm of the gradient, 0 = any", 1.0)
    seed: int = flag("of the weights, the order of the data, dropout", 42)
    shuffle: bool = flag("a new order of shards and documents in every epoch", True)
    device: str = flag("where to train (the best there is)", choices=("cpu", "cuda", "mps"))
    dtype: str = flag("of forward and loss (bfloat16 on cuda, else float32)", choices=("float32", "bfloat16"))
    compile: bool = flag("torch.compile: a minute's wait, then faster steps (on for cuda)")
    val_every: int = flag("steps between validations, 0 = never (preset)")
    val_tokens: int = flag("tokens in one validation, at most the split's", 20 * 2**19)
    hellaswag_every: int = flag("steps between HellaSwag evaluations, 0 = never (preset)")
    sample_every: int = flag("steps between samples, 0 = never (preset)")
    prompt: str = flag("what samples continue", "Hello, I'm a language model,")
    num_samples: int = flag("samples of each rank", 5)
    max_new_tokens: int = flag("tokens of a sample", 22)
    top_k: int = flag("a sample's token is one of so many likeliest", 50)
    temperature: float = flag("of samples: below 1 bolder, above 1 wilder", 1.0)
    checkpoint_every: int = flag("steps between checkpoints, 0 = never, not even last", 5000)
    log_dir: str = flag("where log.txt and checkpoints go", "log")
    resume: bool = flag("go on from log_dir/latest.pt; flags that are left out are as they were", False)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        word = message.removeprefix("unrecognized arguments: ").split("=")[0].split()[0]
        close = difflib.get_close_matches(word, self._option_string_actions, 1)
        raise UserError(f"{message}: " + (f"did you mean {close[0]}?" if close else "--help lists the flags"))


def parse_args(argv=None):
    """
    argv: list of words, None: the command line's. Returns Args, what it left open filled in from preset and machine.
    UserError for what can't work, before any work is done.
    """
    table = [f"{'preset':12} " + " ".join(f"{name:>8.8}" for name in PRESETS["gpt2"])]
    for name, values in PRESETS.items():
        table.append(f"{name:12} " + " ".join(f"{value:8.7g}" for value in values.values()))
    verbatim = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, epilog="\n".join(table), allow_abbrev=False, formatter_class=verbatim)
    for f in fields(Args):
        how = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        parser.add_argument(f"--{f.name}", default=f.default, **how, **f.metadata)
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv, Args())
    if args.resume and (config_file := Path(args.log_dir, "config.json")).exists():
        argv = json.loads(config_file.read_text())["command"][1:] + argv  # the later word counts
        args = parser.parse_args(argv, Args())
    args.command = [sys.argv[0], *(word for word in argv if word != "--resume")]
    if not args.data:
        args.data = "edu_fineweb10B" if any(Path("edu_fineweb10B").glob("*train*.npy")) else "input.txt"
        args.command += ["--data", args.data]  # what else there may be when this run is resumed
    if not Path(args.data).exists():
        raise UserError(f"--data {args.data} does not exist: give a directory of shards or a text file")
    # Weights bring their shape along, and what is typed must agree with it, a preset too; only layers may be more.
    brought = () if not (args.init_from or args.resume) else ("vocab_size",) if args.model else SHAPE
    args.model = args.model or ("gpt2" if Path(args.data).is_dir() else "tiny")
    if args.model not in PRESETS:
        raise UserError(f"there is no preset --model {args.model}: choose from {', '.join(PRESETS)}")
    for name, value in PRESETS[args.model].items():
        if getattr(args, name) is None and name not in ("B", *brought):
            setattr(args, name, value)

    for name, value in vars(args).items():
        positive = (*SHAPE, "B", "T", "total_batch_size", "val_tokens", "num_samples", "max_new_tokens", "top_k")
        lowest = 1 if name in positive else 1e-3 if name == "temperature" else 0
        if isinstance(value, (int, float)) and not value >= lowest:  # NaN is refused too
            raise UserError(f"--{name} {value} is too small: at least {lowest}")
    if args.dropout >= 1:
        raise UserError(f"--dropout {args.dropout} is not a probability below 1")
    args.B = args.B or math.gcd(PRESETS[args.model]["B"], args.total_batch_size // args.T // WORLD_SIZE)
    unit = args.B * args.T * WORLD_SIZE
    if args.total_batch_size % unit:
        below = args.total_batch_size // unit * unit
        works = " or ".join(str(n) for n in (below, below + unit) if n)
        why = f"is not a multiple of B * T * ranks = {args.B} * {args.T} * {WORLD_SIZE} = {unit}"
        raise UserError(f"--total_batch_size {args.total_batch_size} {why}: {works} would be")

    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    args.device = args.device or ("cuda" if cuda else "mps" if mps and WORLD_SIZE == 1 else "cpu")
    if args.device == "cuda" and LOCAL_RANK >= torch.cuda.device_count():
        raise UserError(f"--device cuda: process {LOCAL_RANK} of this machine finds {torch.cuda.device_count()} GPUs")
    if args.device == "mps" and (not mps or WORLD_SIZE > 1):
        raise UserError("--device mps: there is none, or several processes would share it: use --device cpu")
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    args.compile = args.device == "cuda" if args.compile is None else args.compile
    args.min_lr = args.max_lr / 10 if args.min_lr is None else args.min_lr
    return args


# ----------------------------------------------------------------------------------------------------------------------
# Schedule and seeds: functions of the step.


def get_lr(step, max_lr, min_lr, warmup_steps, max_steps):
    """
    Learning rate of a step (counted from 0): linear warmup, then half a cosine down to min_lr at max_steps
    (GPT-3 paper, appendix B). The first step already has max_lr / warmup_steps: a rate of 0 would waste it.
    """
    if step < warmup_steps:
        return max_lr * (step + 1) / warmup_steps
    if step >= max_steps:
        return min_lr
    progress = (step - warmup_steps) / (max_steps - warmup_steps)
    return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (max_lr - min_lr)


def micro_seed(seed, step, micro_batch):
    """Seed of one micro batch's dropout: for a given B the same on any number of ranks, and after a resume."""
    return int(np.random.SeedSequence((seed, step, micro_batch)).generate_state(1)[0])


# ----------------------------------------------------------------------------------------------------------------------
# Files of a run. A file appears under its name only when it is complete, so a kill at any moment leaves the last one.


@contextlib.contextmanager
def complete_file(path):
    """Open a binary file for writing that takes the name `path` at the end, unless an exception comes first."""
    part = Path(path).with_name(Path(path).name + ".part")
    try:
        with open(part, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as e:  # torch.save turns some of a disk's errors into RuntimeError
        why = getattr(e, "strerror", None) or e
        raise UserError(f"{path} can't be written ({why}): make room, or choose another place") from None
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def told_not_raised():
    """A disk that is full or read-only costs a warning, not the run."""
    try:
        yield
    except (UserError, OSError) as e:
        print(f"warning: {e}; training goes on without it", flush=True)


def load_checkpoint(path):
    """The dict in a .pt file that training wrote, on the CPU; plain data only, no code is run. UserError if damaged."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        return checkpoint | {"config": checkpoint["config"]}  # KeyError for a file of something else
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}") from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, TypeError, pickle.UnpicklingError):
        raise UserError(f"{path} is damaged or not a checkpoint of this script: use another one") from None


def restore(optimizer, state):
    """Give an optimizer the moments of a checkpoint; its hyperparameters stay those of the flags."""
    flags = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, values in zip(optimizer.param_groups, flags):
        group.update(values)
    if shard := getattr(optimizer, "optim", None):  # a ZeroRedundancyOptimizer's loader keeps a second copy,
        optimizer.state.clear()
        for p, moments in shard.state.items():  # and puts AdamW's step on the CPU, where its fused kernel does not look
            moments.update({name: t.to(p.device) for name, t in moments.items()})


def log(log_dir, step, **figures):
    """Append a line `{step} {stream} {value}` for each figure (rank 0); 9 digits hold a float32 exactly."""
    if RANK == 0:
        with told_not_raised(), open(log_dir / "log.txt", "a") as f:
            f.writelines(f"{step} {stream} {value:.9g}\n" for stream, value in figures.items())


def open_log(log_dir, resume_step, record):
    """
    Make log_dir ready (rank 0). resume_step None: a new run; an earlier one's directory is moved aside. Else: drop the
    log's lines of the steps that run again. `record` goes to config.json: all that is needed to run it once more.
    """
    log_file = log_dir / "log.txt"
    if resume_step is None and log_file.exists():
        aside = log_dir.rename(f"{log_dir}.{datetime.now():%Y%m%d-%H%M%S}")
        print0(f"{log_dir} held an earlier run (--resume would go on with it): moved to {aside}")
    log_dir.mkdir(parents=True, exist_ok=True)
    if log_file.exists():
        lines = [line.split() for line in log_file.read_text().splitlines()]
        keep = [line for line in lines if len(line) == 3 and int(line[0]) < resume_step]  # a kill may cut the last one
        with complete_file(log_file) as f:
            f.write("".join(" ".join(line) + "\n" for line in keep).encode())
    with complete_file(log_dir / "config.json") as f:
        f.write(json.dumps(record, indent=2).encode())


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation. Both take the bare model and leave training's randomness alone.


@torch.no_grad()
def evaluate(model, loader, rows, device, autocast):
    """Mean loss (nats a token) over the first `rows` rows of the split, dealt to the ranks in micro batches of B."""
    model.eval()
    loader.seek(0)
    total = torch.zeros((), device=device)
    for first in range(RANK * loader.B, rows, WORLD_SIZE * loader.B):
        x, y = (t[: rows - first].to(device) for t in loader.next_batch())
        with autocast:
            _, loss = model(x, y)
        total += loss * len(x)
    if WORLD_SIZE > 1:
        dist.all_reduce(total)
    model.train()
    return total.item() / rows


def print_samples(model, tokenizer, args, device, autocast):
    """Let each rank continue the prompt a few times. Where a token is one byte, four times as far."""
    generator = torch.Generator(device).manual_seed(42 + RANK)
    prompt = tokenizer.encode_ordinary(args.prompt) or [tokenizer.eot_token]
    prompt = torch.tensor(prompt, device=device).expand(args.num_samples, -1)
    length = args.max_new_tokens * (4 if tokenizer.name == "bytes" else 1)
    with autocast:
        rows = model.generate(prompt, length, args.top_k, generator, args.temperature)
    for i, row in enumerate(rows.tolist()):
        print(f"rank {RANK} sample {i}: {tokenizer.decode(row)}", flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# The run: set-up, then the training loop.

# Dense bfloat16, from the vendors' data sheets.
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "L40S": 362e12, "RTX 4090": 165e12}


def keep_freed_memory():
    """
    Let glibc keep what is freed. It would give each large tensor back to the system, and the next one would be mapped and
    cleared page by page: a third of a step's time on a CPU. Does nothing on other systems.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped by itself
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: bytes that may lie free


def main():
    import hellaswag  # here, because it imports from this file

    args = parse_args()
    keep_freed_memory()
    log_dir = Path(args.log_dir)

    # Processes and device. NCCL carries tensors between GPUs, gloo between CPUs.
    device = torch.device(args.device, LOCAL_RANK) if args.device == "cuda" else torch.device(args.device)
    if args.device == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32: what stays float32 multiplies in 10-bit mantissas
    if WORLD_SIZE > 1:
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    autocast = torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16")

    # The model. Drawn on the CPU: the same weights from the same seed on every device and every rank.
    torch.manual_seed(args.seed)
    if origin := str(log_dir / "latest.pt") if args.resume else args.init_from:
        source = load_model(origin)
        for name in SHAPE:
            has, wanted = getattr(source.config, name), getattr(args, name)
            if wanted not in (None, has) and not (name == "n_layer" and wanted > has and not args.resume):
                raise UserError(f"{origin} has {name} {has}, not {wanted}: leave that out (only --init_from adds layers)")
        model = grow(source, args.n_layer or source.config.n_layer, args.dropout)
        del source
    else:
        shape = {name: getattr(args, name) for name in SHAPE}
        model = GPT(GPTConfig(PRESETS[args.model]["T"], **shape, dropout=args.dropout))
    if args.T > model.config.block_size:
        raise UserError(f"--T {args.T} is longer than the model's context: at most {model.config.block_size}")
    model.to(device)
    zero = args.zero and WORLD_SIZE > 1
    optimizers = model.configure_optimizers(args.max_lr, args.weight_decay, args.optimizer == "muon", zero)

    # Data: what a step reads depends on its number alone.
    data = load_text(args.data) if Path(args.data).is_file() else find_shards(args.data, args.val_tokens)
    splits, vocabulary, bytes_per_token = data
    if origin and model.config.eot != vocabulary["eot"]:
        raise UserError(f"{origin} and {args.data} have different tokenizers: their ends of text are different tokens")
    if origin and {model.config.tokenizer, vocabulary["tokenizer"]} == {"gpt2", "bytes"}:
        told = f"{origin} was trained on tokens of {model.config.tokenizer}, {args.data} has {vocabulary['tokenizer']}"
        if args.resume:
            raise UserError(f"--resume: {told}: can GPT-2's merges be had, as before?")
        print0(f"warning: {told}")
    config = model.config = replace(model.config, **vocabulary)
    tokenizer = get_tokenizer(config.tokenizer)
    layout = (args.B, args.T, RANK, WORLD_SIZE, min(config.vocab_size, config.n_tokens))
    train_loader = DataLoaderLite(splits["train"], *layout, args.seed, args.shuffle, config.eot)
    val_loader = DataLoaderLite(splits["val"], *layout)
    val_rows = min(max(args.val_tokens // args.T, 1), val_loader.rows_per_epoch)
    rows_per_step = args.total_batch_size // args.T
    grad_accum_steps = rows_per_step // (args.B * WORLD_SIZE)
    if tokenizer is None and args.sample_every:
        print0("warning: GPT-2's merges can't be downloaded: no samples will be printed")
        args.sample_every = 0

    # HellaSwag's items: rank 0 fetches them, once for all.
    items = [None]
    if args.hellaswag_every and RANK == 0:
        try:
            items = [hellaswag.load_items(hellaswag.download("val"), tokenizer, config.block_size)]
        except (UserError, OSError) as e:
            print(f"warning: {e}; training goes on without HellaSwag", flush=True)
    if args.hellaswag_every and WORLD_SIZE > 1:
        dist.broadcast_object_list(items, device=device)

    # Resume: load, and begin at step k.
    settings = asdict(args) | {"tokenizer": getattr(tokenizer, "name", None)}
    start_step = 0
    if args.resume:
        latest = load_checkpoint(log_dir / "latest.pt")
        if "optimizers" not in latest:
            raise UserError(f"--resume: {log_dir}/latest.pt holds weights only: --init_from begins with them")
        start_step, before = latest["step"], latest["args"]
        if start_step > args.max_steps:
            raise UserError(f"--resume: {log_dir} is at step {start_step}: raise --max_steps {args.max_steps}")
        if (was := before["optimizer"]) != args.optimizer:
            raise UserError(f"--resume: {log_dir} was trained with {was}: give --optimizer {was}")
        for optimizer, state in zip(optimizers, latest["optimizers"]):
            restore(optimizer, state)
        for name, was in before.items():
            if settings.get(name) != was and name not in ("resume", "B"):
                print0(f"--resume: {name} was {was}, is {settings.get(name)}")
        del latest  # gigabytes
    train_loader.seek(start_step * rows_per_step)

    if WORLD_SIZE > 1:
        dist.barrier()  # all have read what they need of log_dir, which may be moved aside now
    if RANK == 0 and args.max_steps > 0:  # --max_steps 0 only looks at a model: no files
        name = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()} x {os.cpu_count()}"
        here = Path(__file__).resolve().parent
        failed, commit = subprocess.getstatusoutput(f'git -C "{here}" describe --always --dirty --exclude "*"')
        record = {
            "command": args.command, "args": settings, "config": asdict(config), "world_size": WORLD_SIZE, "device": name,
            "tokens_per_epoch": train_loader.rows_per_epoch * args.T, "shards": len(train_loader.rows),
            "started": f"{datetime.now():%Y-%m-%d %H:%M:%S}", "commit": None if failed else commit,
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        }  # fmt: skip
        open_log(log_dir, start_step if args.resume else None, record)

    # Two names for the same weights: `model` is evaluated and saved, `train_model` is compiled and synchronised.
    train_model = torch.compile(model) if args.compile else model
    if WORLD_SIZE > 1:
        gpus = [LOCAL_RANK] if args.device == "cuda" else None
        train_model = DDP(train_model, device_ids=gpus, gradient_as_bucket_view=True)  # else each gradient is there twice

    def save(step, name, **more):
        if RANK == 0:
            with told_not_raised(), complete_file(log_dir / name) as f:
                torch.save({"model": model.state_dict(), "config": asdict(config), "step": step, **more}, f)

    def save_latest(step):
        if zero:  # rank 0 gets the others' part of the state
            for optimizer in optimizers:
                optimizer.consolidate_state_dict()
            if device.type != "cpu":
                torch.accelerator.synchronize()  # it copies without waiting
        if RANK == 0:
            save(step, "latest.pt", optimizers=[o.state_dict() for o in optimizers], args=settings)

    signals = []  # Ctrl-C and SIGTERM finish the step, save and end
    for number in (signal.SIGINT, signal.SIGTERM) if args.max_steps > 0 else ():
        signal.signal(number, lambda number, frame: signals.append(number))

    n_params = sum(p.numel() for p in model.parameters())
    # Forward and backward, a token: 6 for each weight that multiplies, 12 * T * n_embd a layer for attention
    # (PaLM paper, appendix B). The position embedding multiplies nothing; the token embedding does, as the head.
    flops = 6 * (n_params - model.transformer.wpe.weight.numel()) + 12 * config.n_layer * config.n_embd * args.T
    peak = next((v for k, v in PEAK_FLOPS.items() if args.device == "cuda" and k in torch.cuda.get_device_name()), None)
    print0(
        f"{args.model}: {n_params:,} parameters; {args.data}: {train_loader.rows_per_epoch * args.T:,} tokens; "
        f"a step is {args.total_batch_size:,} tokens: {args.B} rows of {args.T} x {grad_accum_steps} micro steps x "
        f"{WORLD_SIZE} ranks; {args.device}, {args.dtype}{', compiled' if args.compile else ''}; log in {log_dir}"
    )

    def report(step, **figures):
        print0(f"step {step:5d} | " + " | ".join(f"{name} {value:.4f}" for name, value in figures.items()))
        if args.max_steps > 0:
            log(log_dir, step, **figures)

    def due(every, step):
        return every and (step % every == 0 or step == args.max_steps)

    begin = time.time()
    for step in range(start_step, args.max_steps + 1):
        # Evaluate, sample, save: the model after `step` steps.
        val_loss = None
        if args.val_every and (due(args.val_every, step) or due(args.checkpoint_every, step)):
            val_loss = evaluate(model, val_loader, val_rows, device, autocast)
            # Bits per byte are comparable across tokenizers.
            bits = {"val_bpb": val_loss / math.log(2) / bytes_per_token} if bytes_per_token else {}
            report(step, val=val_loss, **bits)
        if items[0] and due(args.hellaswag_every, step):
            guesses = hellaswag.evaluate(model, items[0], device, autocast)
            report(step, hella=hellaswag.accuracy(guesses, items[0], device)[1])
        if due(args.sample_every, step) and (step > 0 or args.max_steps == 0):
            print_samples(model, tokenizer, args, device, autocast)
        if due(args.checkpoint_every, step) and step > 0:
            save(step, f"model_{step:05d}.pt", val_loss=val_loss)
            save_latest(step)
        if step == args.max_steps:
            break

        # One step.
        t0 = time.time()
        loss = torch.zeros((), device=device)
        for micro_step in range(grad_accum_steps):
            try:
                x, y = train_loader.next_batch()
            except UserError:  # a bad shard, met in mid run. Several ranks can't save: the others may not have met it yet
                if WORLD_SIZE == 1:
                    save_latest(step)
                raise
            if device.type == "cuda":
                x, y = x.pin_memory(), y.pin_memory()
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            torch.manual_seed(micro_seed(args.seed, step, micro_step * WORLD_SIZE + RANK))
            if WORLD_SIZE > 1:  # only the last backward averages gradients over ranks; forward prepares for it
                train_model.require_backward_grad_sync = micro_step == grad_accum_steps - 1
            with autocast:
                _, micro_loss = train_model(x, y)
            micro_loss = micro_loss / grad_accum_steps  # gradients add up over micro steps, the objective is a mean
            micro_loss.backward()
            loss += micro_loss.detach()
        figures = torch.stack((loss / WORLD_SIZE, torch.tensor(float(len(signals)), device=device)))
        if WORLD_SIZE > 1:
            dist.all_reduce(figures)  # the mean loss; and the wish to stop of any rank, so that all stop at one step
        norm = nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip or math.inf)
        lr = get_lr(step, args.max_lr, args.min_lr, args.warmup_steps, args.max_steps)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
        if device.type != "cpu":
            torch.accelerator.synchronize()  # the GPU works behind our back; the clock must not
        dt = time.time() - t0

        (loss, stop_now), norm = figures.tolist(), norm.item()
        if not math.isfinite(loss + norm):
            raise UserError(f"step {step}: loss {loss}, gradient norm {norm}: lower --max_lr, and begin again or --resume")
        eta = timedelta(seconds=round((time.time() - begin) / (step + 1 - start_step) * (args.max_steps - step - 1)))
        speed = args.total_batch_size / dt
        mfu = f" | mfu {flops * speed / (peak * WORLD_SIZE):.1%}" if peak else ""
        print0(
            f"step {step:5d} | loss {loss:.6f} | lr {lr:.3e} | norm {norm:.4f} | {dt * 1000:.0f} ms | "
            f"{speed:,.0f} tok/s{mfu} | eta {eta}"
        )
        log(log_dir, step, train=loss, lr=lr, norm=norm)
        if stop_now:
            if args.checkpoint_every:
                save_latest(step + 1)
            print0(f"stopped after step {step}" + "; --resume goes on" * bool(args.checkpoint_every))
            break
    if WORLD_SIZE > 1:
        dist.destroy_process_group()


def run(main):
    """Call `main`; a mistake of the person's or the file system's ends in one `error:` line and status 2."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (UserError, OSError) as e:
        if RANK > 0:  # rank 0 made the same mistake and says so, and torchrun then ends this process;
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(4 + RANK)  # who lives on met something of its own
        print("error:", " ".join(str(e).split()), file=sys.stderr, flush=True)
        sys.exit(2)


if __name__ == "__main__":
    sys.modules["train_gpt2"] = sys.modules["__main__"]  # so that what hellaswag.py imports is this, not a copy
    run(main)
