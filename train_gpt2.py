"""GPT-2, built, trained and judged in one file, to be read from the first line to the last."""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F

# ----------------------------------------------------------------------------------------------------------------------
# The model. A clean residual stream that attention and MLP read from and add to, once each in every block.

VOCAB_SIZE = 50257  # GPT-2's tokens: 50,000 merges + 256 bytes + <|endoftext|>; rows beyond it are padding
EOT = 50256  # <|endoftext|>, the token that begins every document
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


@dataclass
class GPTConfig:
    """The shape of a model; the defaults are GPT-2 124M as released."""

    block_size: int = 1024  # longest sequence: rows of the position embedding
    vocab_size: int = 50257  # 50,000 merges + 256 bytes + <|endoftext|>
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768


class CausalSelfAttention(nn.Module):
    """Tokens communicate: each gathers from itself and the tokens before it."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # query, key, value of all heads at once
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for t in (q, k, v))  # (B, nh, T, hs)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # flash: (T, T) is never stored
        y = y.transpose(1, 2).reshape(B, T, C)  # heads side by side again
        return self.c_proj(y)


class MLP(nn.Module):
    """Each token thinks by itself about what it gathered."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        x = F.gelu(self.c_fc(x), approximate="tanh")  # erf was slow in 2019; kept, because GPT-2 has it
        return self.c_proj(x)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))  # norms sit inside the branches (pre-norm):
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

    def hidden(self, idx):
        """idx: int64 (B, T), T <= block_size. Returns what the head reads: float (B, T, n_embd)."""
        T = idx.size(1)
        if T > self.config.block_size:
            raise ValueError(f"sequence of {T} tokens, but block_size is {self.config.block_size}")
        x = self.transformer.wte(idx) + self.transformer.wpe(torch.arange(T, device=idx.device))
        for block in self.transformer.h:
            x = block(x)
        return self.transformer.ln_f(x)

    def forward(self, idx, targets=None):
        """idx, targets: int64 (B, T). Returns logits (B, T, vocab_size) and the mean cross entropy in nats, or None."""
        logits = self.lm_head(self.hidden(idx))
        if targets is None:
            return logits, None
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())  # float: bf16 has 3 digits
        return logits, loss

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, top_k=50, generator=None):
        """
        Continue idx, int64 (B, T), each token drawn from the `top_k` likeliest, never from the vocabulary's padding; beyond
        block_size the oldest leave the context. generator: on idx's device. Returns int64 (B, T + max_new_tokens).
        """
        was_training = self.training
        self.eval()
        for _ in range(max_new_tokens):
            last = self.hidden(idx[:, -self.config.block_size :])[:, -1]  # only the last position needs logits
            logits = self.lm_head(last)[:, :VOCAB_SIZE].float()
            logits, candidates = logits.topk(min(top_k, logits.size(-1)))
            choice = torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)
            idx = torch.cat((idx, candidates.gather(1, choice)), dim=1)
        self.train(was_training)
        return idx

    def configure_optimizer(self, lr, weight_decay):
        """AdamW as in GPT-3 (Brown et al. 2020, appendix B); only matrices and embeddings decay, not biases and norms."""
        decay = [p for p in self.parameters() if p.dim() >= 2]
        rest = [p for p in self.parameters() if p.dim() < 2]
        for group, what in (decay, "decayed"), (rest, "not decayed"):
            print(f"{what}: {len(group)} tensors, {sum(p.numel() for p in group):,} parameters")
        groups = [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8, fused=True)

    @classmethod
    def from_pretrained(cls, name_or_dir):
        """Released weights ("gpt2", ... "gpt2-xl") or a directory that Hugging Face's save_pretrained wrote."""
        from transformers import GPT2LMHeadModel

        hf, info = GPT2LMHeadModel.from_pretrained(name_or_dir, output_loading_info=True)
        c = hf.config
        if info["missing_keys"] or c.activation_function not in ("gelu_new", "gelu_pytorch_tanh"):
            raise ValueError(f"{name_or_dir} is not a GPT-2 language model: give a released name or its directory")
        model = cls(GPTConfig(c.n_positions, c.vocab_size, c.n_layer, c.n_head, c.n_embd))
        model.load_state_dict(transpose_conv1d(hf.float().state_dict()))
        return model


def transpose_conv1d(state):
    """Hugging Face keeps four weights a block as Conv1D, (in, out), where nn.Linear has (out, in)."""
    return {name: w.t() if name.endswith(CONV1D) else w for name, w in state.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Data.


def get_tokenizer(text_file=False):
    """GPT-2's BPE (tiktoken.Encoding). Where its merges can't be had: None, or for a text file its single-byte tokens."""
    try:
        return tiktoken.get_encoding("gpt2")
    except OSError:  # no network, and nothing in tiktoken's cache
        if not text_file:
            return None
    print("warning: GPT-2's merges can't be downloaded: the text becomes GPT-2's single-byte tokens, longer and coarser")
    # The vocabulary begins with the bytes that print (in Latin-1), then has the others, both in order.
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    order = printable + [b for b in range(256) if b not in printable]
    # The ids in between are never made from text, but a young model samples them: give them a printable name.
    names = {f"<|{i}|>": i for i in range(256, EOT)} | {"<|endoftext|>": EOT}
    ranks = {bytes([b]): i for i, b in enumerate(order)}
    return tiktoken.Encoding("gpt2-bytes", pat_str=r"\s?\S+|\s", mergeable_ranks=ranks, special_tokens=names)


class DataLoaderLite:
    """Walks a text in steps of B * T tokens, and begins again at its end."""

    def __init__(self, path, B, T):
        self.B, self.T, self.position = B, T, 0
        self.tokens = torch.tensor(get_tokenizer(text_file=True).encode_ordinary(Path(path).read_text()))
        print(f"{len(self.tokens):,} tokens: an epoch has {len(self.tokens) // (B * T)} batches of {B} x {T}")

    def next_batch(self):
        """Inputs and targets, int64 (B, T) each, targets one token ahead."""
        if self.position + self.B * self.T + 1 > len(self.tokens):
            self.position = 0
        run = self.tokens[self.position : self.position + self.B * self.T + 1]
        self.position += self.B * self.T
        return run[:-1].view(self.B, self.T), run[1:].view(self.B, self.T)


# ----------------------------------------------------------------------------------------------------------------------
# Schedule.


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


# ----------------------------------------------------------------------------------------------------------------------
# The run.

def main():
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    torch.manual_seed(1337)
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs that have it: multiply in 10-bit mantissas, add in float32
    model = GPT(GPTConfig(vocab_size=50304)).to(device)
    B, T, max_steps = 4, 64, 20
    loader = DataLoaderLite("input.txt", B, T)
    total_batch_size = 1024  # tokens; 2**19 in the real run
    grad_accum_steps = total_batch_size // (B * T)
    train_model = torch.compile(model) if device == "cuda" else model  # shares the weights; a CPU run is too short for it
    optimizer = model.configure_optimizer(lr=6e-4, weight_decay=0.1)
    for step in range(max_steps):
        t0 = time.time()
        optimizer.zero_grad()
        total = 0.0
        for micro_step in range(grad_accum_steps):
            x, y = (t.to(device) for t in loader.next_batch())
            with torch.autocast(device, torch.bfloat16):
                _, loss = train_model(x, y)
            loss = loss / grad_accum_steps  # gradients add up over micro steps, the objective is a mean
            loss.backward()
            total += loss.detach()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        lr = get_lr(step, 6e-4, 6e-5, 2, max_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        if device != "cpu":
            torch.accelerator.synchronize()  # the GPU works behind our back; the clock must not
        dt = time.time() - t0
        print(f"step {step:2d} | loss {total.item():.4f} | lr {lr:.2e} | norm {norm:.2f} | {dt * 1000:.0f} ms | {total_batch_size / dt:,.0f} tok/s")


if __name__ == "__main__":
    main()
