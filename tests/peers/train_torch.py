"""One training run of the same model in PyTorch with fused attention; prints one JSON line.

Runs in the environment of requirements.txt, without fm_jax. AdamW(fused=True), gradients clipped at norm 1,
tied embeddings, float32 parameters. The model is written the way PyTorch likes it best: one projection for queries,
keys and values, F.scaled_dot_product_attention; F.cross_entropy over all logits, or by chunks that are computed again
for the gradient. On a CPU eager and in float32; with `--gpu` compiled, in bfloat16 autocast, with flash attention.
With `--weights` and `--batches`, files that same_losses.py writes, it starts from our parameters and
prints the losses to compare; else both are random.

Try:  python tests/peers/train_torch.py --model gpt2 --steps 8
"""

import argparse
import contextlib
import json
import pathlib
import re
import time

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

MODELS = {   # as configs/causal_lm.py:bench_NAME
    "gpt2": dict(layers=6, width=384, heads=6, kv_heads=6, mlp=1536, vocab=8192, seq_len=256, batch=16,
                 llama=False),
    "llama": dict(layers=8, width=512, heads=8, kv_heads=4, mlp=1408, vocab=8192, seq_len=512, batch=8,
                  llama=True),
    "1b": dict(layers=16, width=2048, heads=32, kv_heads=8, mlp=8192, vocab=128256, seq_len=4096, batch=8,
               llama=True, loss_chunk_tokens=4096),
    "tiny": dict(layers=2, width=32, heads=4, kv_heads=4, mlp=64, vocab=512, seq_len=64, batch=8, llama=True,
                 loss_chunk_tokens=128),
}
NORM_EPS, ROPE_THETA = 1e-5, 10000.0


def make_norm(c):
    return nn.RMSNorm(c["width"], eps=NORM_EPS) if c["llama"] else nn.LayerNorm(c["width"], eps=NORM_EPS)


def rotate(x, cos, sin):
    """Returns x [B, heads, T, H] rotated, halves paired."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads, self.kv_heads, self.head = c["heads"], c["kv_heads"], c["width"] // c["heads"]
        width, kv_width, bias = c["width"], self.kv_heads * self.head, not c["llama"]
        self.llama = c["llama"]
        self.norm1, self.norm2 = make_norm(c), make_norm(c)
        self.qkv = nn.Linear(width, width + 2 * kv_width, bias)
        self.out = nn.Linear(width, width, bias)
        self.gate = nn.Linear(width, c["mlp"], False) if self.llama else None
        self.up = nn.Linear(width, c["mlp"], bias)
        self.down = nn.Linear(c["mlp"], width, bias)

    def forward(self, x, rope):
        B, T, D = x.shape
        kv_width = self.kv_heads * self.head
        q, k, v = self.qkv(self.norm1(x)).split((D, kv_width, kv_width), dim=-1)
        q, k, v = (y.view(B, T, -1, self.head).transpose(1, 2) for y in (q, k, v))
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, D))
        h = self.norm2(x)
        h = F.silu(self.gate(h)) * self.up(h) if self.llama else F.gelu(self.up(h), approximate="tanh")
        return x + self.down(h)


class Model(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.recompute, self.loss_chunk_tokens = c.get("recompute", False), c.get("loss_chunk_tokens", 0)
        self.embed = nn.Embedding(c["vocab"], c["width"])
        self.positions = None if c["llama"] else nn.Embedding(c["seq_len"], c["width"])
        self.blocks = nn.ModuleList(Block(c) for _ in range(c["layers"]))
        self.norm = make_norm(c)
        self.rope = None
        if c["llama"]:
            head = c["width"] // c["heads"]
            freqs = ROPE_THETA ** (-torch.arange(0, head, 2, dtype=torch.float64) / head)
            angles = (torch.arange(c["seq_len"])[:, None] * freqs).float()
            self.rope = angles.cos(), angles.sin()   # on the device that is the default when a model is made
        for p in self.parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=0.02)

    def forward(self, tokens, targets):
        x = self.embed(tokens)
        if self.positions is not None:
            x = x + self.positions.weight
        for block in self.blocks:
            x = checkpoint(block, x, self.rope, use_reentrant=False) if self.recompute else block(x, self.rope)
        x, targets = self.norm(x).flatten(0, 1), targets.flatten()
        if not self.loss_chunk_tokens:
            return F.cross_entropy(x @ self.embed.weight.T, targets)
        parts = zip(x.split(self.loss_chunk_tokens), targets.split(self.loss_chunk_tokens))
        return sum(checkpoint(self.loss_sum, *part, use_reentrant=False) for part in parts) / len(targets)

    def loss_sum(self, x, targets):
        return F.cross_entropy((x @ self.embed.weight.T).float(), targets, reduction="sum")


@torch.no_grad()
def load_weights(model, path):
    """Copies our parameters, an .npz of dotted names with layers stacked first, into the model."""
    w = {n: torch.from_numpy(a) for n, a in np.load(path).items()}
    width, unused = model.embed.weight.shape[1], set(w)

    def take(name, layer=None):
        unused.discard(name)
        return w[name] if layer is None else w[name][layer]

    def copy(to, value):
        to.copy_(value.reshape(to.shape))

    copy(model.embed.weight, take("embed.tokens"))
    if model.positions is not None:
        copy(model.positions.weight, take("embed.positions")[: model.positions.weight.shape[0]])
    copy(model.norm.weight, take("transformer.final_norm.scale"))
    if not model.blocks[0].llama:
        copy(model.norm.bias, take("transformer.final_norm.bias"))
    for i, block in enumerate(model.blocks):
        get = lambda name: take(f"transformer.layers.{name}", i)
        copy(block.qkv.weight, torch.cat([get(f"attention.{n}").reshape(width, -1) for n in ("wq", "wk", "wv")], 1).T)
        copy(block.out.weight, get("attention.wo").reshape(-1, width).T)
        copy(block.up.weight, get("mlp.w_up").T)
        copy(block.down.weight, get("mlp.w_down").T)
        copy(block.norm1.weight, get("attention_norm.scale"))
        copy(block.norm2.weight, get("mlp_norm.scale"))
        if block.llama:
            copy(block.gate.weight, get("mlp.w_gate").T)
            continue
        copy(block.qkv.bias, torch.cat([get(f"attention.{n}_bias").flatten() for n in "qkv"]))
        copy(block.out.bias, get("attention.o_bias"))
        copy(block.up.bias, get("mlp.up_bias"))
        copy(block.down.bias, get("mlp.down_bias"))
        copy(block.norm1.bias, get("attention_norm.bias"))
        copy(block.norm2.bias, get("mlp_norm.bias"))
    if unused:
        raise SystemExit(f"{path}: parameters this model does not have: {sorted(unused)}")


def main():
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--model", choices=MODELS, required=True)
    flags.add_argument("--steps", type=int, default=8)
    flags.add_argument("--warmup", type=int, default=2, help="first steps left out of the times")
    flags.add_argument("--threads", type=int, default=0, help="0: PyTorch's own choice")
    flags.add_argument("--weights", help=".npz of our parameters")
    flags.add_argument("--batches", help=".npy of tokens, int32 [steps, batch, seq_len + 1]")
    flags.add_argument("--learning_rate", type=float, default=1e-3)
    flags.add_argument("--batch", type=int, default=0, help="rows of a step; 0: the model's own")
    flags.add_argument("--recompute", action="store_true", help="each block's activations again in the backward pass")
    flags.add_argument("--gpu", action="store_true", help="torch.compile, bfloat16 autocast, flash attention")
    flags.add_argument("--device", default="", help="default: cuda with --gpu, else cpu")
    args = flags.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    c = MODELS[args.model] | {"recompute": args.recompute}
    c["batch"] = args.batch or c["batch"]
    device = torch.device(args.device or ("cuda" if args.gpu else "cpu"))
    with device:
        model = Model(c)
    run, inside = model, contextlib.nullcontext
    if args.gpu:
        torch.set_float32_matmul_precision("high")
        run = torch.compile(model, dynamic=False)

        @contextlib.contextmanager
        def inside():   # not the unfused form: where no flash kernel takes the model, this fails and says so
            with torch.autocast(device.type, torch.bfloat16), sdpa_kernel([SDPBackend.FLASH_ATTENTION,
                                                                           SDPBackend.CUDNN_ATTENTION]):
                yield

    if args.weights:
        load_weights(model, args.weights)
    rng = np.random.default_rng(0)
    batches = np.load(args.batches) if args.batches else rng.integers(
        c["vocab"], size=(args.steps, c["batch"], c["seq_len"] + 1), dtype=np.int32)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
                                  lr=args.learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=True)
    times, cpu_times, losses = [], [], []
    for step in range(args.steps):
        if step == args.warmup and device.type == "cpu":
            pathlib.Path("/proc/self/clear_refs").write_text("5")   # the resident peak starts again, as in ours
        start, cpu_start = time.perf_counter(), time.process_time()
        rows = torch.from_numpy(batches[step % len(batches)]).to(device).long()
        with inside():
            loss = run(rows[:, :-1], rows[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        times.append(time.perf_counter() - start)
        cpu_times.append(time.process_time() - cpu_start)
        if step == 0:
            print(json.dumps({"first_step": losses[0]}), flush=True)   # startup.py waits for this line
    times, cpu_times = times[args.warmup:] or times, cpu_times[args.warmup:] or cpu_times
    median = float(np.median(times))
    print(json.dumps({
        "model": args.model, "parameters": sum(p.numel() for p in model.parameters()), "step_times_s": times,
        "step_time_s": median, "step_cpu_time_s": float(np.median(cpu_times)),
        "tokens_per_s": c["batch"] * c["seq_len"] / median, "losses": losses[:5],
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else
        1024 * int(re.search(r"VmHWM:\s*(\d+)", pathlib.Path("/proc/self/status").read_text())[1]),
        "threads": torch.get_num_threads(), "torch": torch.__version__}))


if __name__ == "__main__":
    main()
