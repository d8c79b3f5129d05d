"""What a Transformer is made of, as plain data: fields, sizes, parameter and FLOP counts.

Layer 0 and free of jax, so that a command line can validate, count and print a 405B model at
once. `model.py` turns an `Architecture` into arrays; the counts here are tested against it.
"""

import dataclasses
import math

from fm_jax.errors import UserError, choose

ROPE_SCALINGS = {   # the keys of `rope_scaling`, beside "type", and their defaults
    "linear": {"factor": 1.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len": 8192},
    "yarn": {"factor": 4.0, "original_max_seq_len": 4096, "beta_fast": 32.0, "beta_slow": 1.0,
             "attention_factor": 0.0},   # 0: 0.1 ln(factor) + 1
}

CHOICES = {
    "norm": ("rmsnorm", "layernorm"),
    "norm_position": ("pre", "post", "sandwich", "output"),
    "activation": ("gelu", "gelu_tanh", "silu", "relu", "quick_gelu"),
    "position": ("rope", "learned", "sinusoidal", "relative", "learned_relative", "none"),
    "qk_norm": ("none", "head", "full"),
    "pooling": ("none", "first", "mean", "end", "last", "attention"),
    "router_score": ("softmax", "sigmoid"),
    "remat": ("none", "full", "dots", "offload_full", "offload_dots"),
    "attention_kernel": ("auto", "reference", "chunked", "splash", "cudnn"),
    "dtype": ("float32", "bfloat16", "float16"),
    "matmul_dtype": ("", "int8", "fp8"),
    "param_dtype": ("float32", "bfloat16"),
}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One stack of Transformer blocks with its embedding and head.

    An encoder is `causal=False`; an encoder-decoder is two of these, the second with
    `cross_attention=True`. Defaults are Llama-like; the trailing comments give the alternatives.
    """

    vocab_size: int = 8192
    num_layers: int = 4
    embed_dim: int = 256
    num_heads: int = 4
    num_kv_heads: int = 0               # 0: num_heads; fewer: grouped-query attention; 1: multi-query
    head_dim: int = 0                   # 0: embed_dim / num_heads
    mlp_dim: int = 0                    # 0: 4 embed_dim, or 8/3 embed_dim up to a multiple of 64 if gated
    max_seq_len: int = 2048             # rows of the learned position table; context length of the run's model

    causal: bool = True                 # False: bidirectional
    cross_attention: bool = False       # each block also attends to an encoder's output
    layer_pattern: tuple[str, ...] = ("global",)   # repeated over the depth, of "global" and "local"
    window: int = 0                     # local layers see the last `window` tokens, themselves included

    norm: str = "rmsnorm"               # layernorm
    norm_position: str = "pre"          # x+f(n(x)); post: n(x+f(x)); sandwich: x+n(f(n(x))); output: x+n(f(x))
    parallel_residual: bool = False     # x+f(n1(x))+g(n2(x)): attention and mlp both read the block's input (GPT-NeoX)
    norm_eps: float = 1e-6
    norm_bias: bool = False
    norm_zero_centered: bool = False    # stores scale - 1 (Gemma)
    first_norm: bool = True             # False: the first attention reads the embeddings as they are (ModernBERT)
    final_norm: bool = True             # norm after the last block; False with norm_position="post" (BERT)

    activation: str = "silu"            # gelu (erf), gelu_tanh, relu, quick_gelu (x sigmoid(1.702 x), CLIP)
    gated_mlp: bool = True              # SwiGLU with silu, GeGLU with gelu
    qkv_bias: bool = False
    key_bias: bool = True               # False: queries and values alone have the qkv_bias (Whisper)
    attention_out_bias: bool = False
    prompt_tokens: int = 0              # learned keys and values of so many places in each layer, behind a gate that is
                                        # shut at first: what prefix tuning trains, of a model that is frozen else
    mlp_bias: bool = False

    num_experts: int = 0                # 0: one mlp for all tokens; else so many in each block, of which a router picks
    num_dense_layers: int = 0           # so many first blocks have an mlp of mlp_dim all the same (DeepSeek)
    experts_per_token: int = 2          # those of the highest scores
    expert_dim: int = 0                 # mlp hidden of one expert; 0: mlp_dim
    num_shared_experts: int = 0         # beside them, all tokens go through an mlp of so many times expert_dim
    router_score: str = "softmax"       # over all experts; sigmoid: of each on its own (DeepSeek-V3)
    router_renormalize: bool = True     # an expert's weight is its score over the sum of the chosen; False: its score
    router_scale: float = 1.0           # times this (DeepSeek-V3: 2.5)
    router_bias: bool = False           # is added to the scores for the choice alone, and learns to even out the load
    capacity_factor: float = 0.0        # in training, an expert has room for this times its even share of each row's
                                        # tokens and drops the rest; 0: no token is dropped

    position: str = "rope"              # learned, sinusoidal, relative, learned_relative (both, MPNet), none
    relative_buckets: int = 32          # relative: a head adds to its scores a number by the distance of query and key,
    relative_max_distance: int = 128    # one of so many, the same in all layers; from this distance on one and the same
    rope_theta: float = 10000.0
    rope_local_theta: float = 0.0       # of local layers; 0: rope_theta, unscaled where this is set (Gemma 3)
    rope_frac: float = 1.0              # of each head is rotated
    rope_scaling: dict = dataclasses.field(default_factory=lambda: {"type": "none"})   # see ROPE_SCALINGS

    qk_norm: str = "none"               # head: over each head; full: over all heads at once
    attention_scale: float = 0.0        # 0: head_dim ** -0.5
    attention_softcap: float = 0.0      # cap * tanh(score / cap); 0: off
    logit_softcap: float = 0.0
    logit_scale: float = 1.0            # hidden states are multiplied by it before the head (T5, tied: embed_dim ** -0.5)

    position_offset: int = 0            # row of the learned positions' table for the first place (RoBERTa: 2)
    num_token_types: int = 0            # rows of a table added to the embeddings: which of two texts a token is of (BERT)
    embed_norm: bool = False            # of the embeddings' sum (BERT)
    head_transform: bool = False        # before the logits a projection (with mlp_bias a bias too), the activation and
                                        # a norm; logits have a bias

    patch_size: int = 0                 # side of the squares that an image is cut into, in pixels; 0: tokens, no images
    channels: int = 3                   # of a pixel
    patch_bias: bool = True             # of the patches' projection
    class_token: bool = False           # a learned first token, before the patches
    pooling: str = "none"               # one vector of an image: of its first token, the mean, or what a learned query
                                        # attends to (attention); of a text: of its end (CLIP), the last place whatever
                                        # is there (SigLIP), or the mean

    tie_embeddings: bool = True
    embed_scale: float = 1.0            # token embeddings are multiplied by it (Gemma: sqrt(embed_dim))
    dropout: float = 0.0                # of embeddings, attention output and mlp output, in training

    dtype: str = "float32"              # of activations and matmuls; norms, softmax and loss are float32
    param_dtype: str = "float32"
    matmul_dtype: str = ""              # of the projections' operands: int8, fp8, each scaled; "": dtype
    remat: str = "none"                 # full: keep block inputs only; dots: and projections' outputs; offload_full,
                                        # offload_dots: keep the former, or the latter, in the host's memory
    scan_layers: bool = True            # one compiled block; False unrolls: slower to compile, faster on CPU
    pipeline_microbatches: int = 0      # of a batch, on a mesh with stages; 0: as many as stages. More: less idle time
    pipeline_repeats: int = 1           # rounds of a microbatch through the stages, some layers each: the same
    attention_kernel: str = "auto"      # reference, chunked; splash (TPU), cudnn (NVIDIA): see kernels.attention
    loss_chunk_tokens: int = 1024       # cross-entropy makes logits of so many tokens at once

    def __post_init__(self):
        set_ = lambda name, value: object.__setattr__(self, name, value)
        set_("layer_pattern", tuple(self.layer_pattern))
        set_("rope_scaling", dict(self.rope_scaling))
        for name in ("vocab_size", "num_layers", "embed_dim", "num_heads", "max_seq_len", "loss_chunk_tokens",
                     "pipeline_repeats"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "must be positive")
        for name in ("num_kv_heads", "head_dim", "mlp_dim", "window", "rope_local_theta", "attention_scale",
                     "attention_softcap", "logit_softcap", "pipeline_microbatches", "num_experts", "expert_dim",
                     "num_shared_experts", "capacity_factor", "num_dense_layers",
                     "position_offset", "num_token_types", "prompt_tokens", "patch_size"):
            _require(0 <= getattr(self, name) < float("inf"), name, getattr(self, name), "must be 0 or more")
        if not self.num_kv_heads:
            set_("num_kv_heads", self.num_heads)
        if not self.head_dim:
            _require(self.embed_dim % self.num_heads == 0, "num_heads", self.num_heads,
                     f"must divide embed_dim={self.embed_dim}, or set model.head_dim")
            set_("head_dim", self.embed_dim // self.num_heads)
        if not self.mlp_dim:
            set_("mlp_dim", -(-8 * self.embed_dim // 3 // 64) * 64 if self.gated_mlp else 4 * self.embed_dim)
        if not self.expert_dim and self.num_experts:
            set_("expert_dim", self.mlp_dim)
        self._validate()

    def _validate(self):
        for name, options in CHOICES.items():
            choose(getattr(self, name), options, f"model.{name}")
        for name in ("norm_eps", "rope_theta", "logit_scale"):
            _require(0 < getattr(self, name) < float("inf"), name, getattr(self, name), "must be positive")
        _require(self.num_heads % self.num_kv_heads == 0, "num_kv_heads", self.num_kv_heads,
                 f"must divide num_heads={self.num_heads}")
        _require(len(self.layer_pattern) > 0, "layer_pattern", self.layer_pattern, "must name at least one layer")
        _require(not (self.matmul_dtype and self.num_experts), "matmul_dtype", self.matmul_dtype,
                 "is not for experts; set it to '' or num_experts to 0")
        _require(not self.parallel_residual or self.norm_position == "pre" and not self.cross_attention,
                 "parallel_residual", self.parallel_residual, "needs norm_position='pre' and no cross_attention")
        for kind in self.layer_pattern:
            choose(kind, ("global", "local"), "model.layer_pattern")
        _require("local" not in self.layer_pattern or self.window > 0, "window", self.window,
                 "must be positive where layer_pattern has local layers")
        _require(self.first_norm or self.norm_position == "pre" and not (
            self.num_experts or self.parallel_residual or self.cross_attention), "first_norm", self.first_norm,
                 "needs norm_position='pre', and no experts, parallel_residual or cross_attention")
        if self.has_relative_bias:
            _require(self.relative_buckets >= 4 and self.relative_buckets % 4 == 0, "relative_buckets",
                     self.relative_buckets, "must be a multiple of 4")
            _require(self.relative_max_distance > self.relative_buckets, "relative_max_distance",
                     self.relative_max_distance, f"must exceed relative_buckets={self.relative_buckets}")
            _require(not self.attention_softcap, "attention_softcap", self.attention_softcap,
                     "is not for scores that relative positions are added to; set it to 0")
        _require(0 < self.rope_frac <= 1, "rope_frac", self.rope_frac, "must be in (0, 1]")
        _require(self.position != "rope" or self.rope_dim % 2 == 0, "head_dim", self.head_dim,
                 "times rope_frac must be even")
        if self.num_experts:
            _require(1 <= self.experts_per_token <= self.num_experts, "experts_per_token", self.experts_per_token,
                     f"must be from 1 to num_experts={self.num_experts}")
            _require(0 < self.router_scale < float("inf"), "router_scale", self.router_scale, "must be positive")
            _require(not self.mlp_bias, "mlp_bias", self.mlp_bias, "must be False: experts have no biases")
            _require(self.num_dense_layers < self.num_layers and not self.num_dense_layers % len(self.layer_pattern),
                     "num_dense_layers", self.num_dense_layers, f"must be below num_layers={self.num_layers}, and a "
                     f"multiple of the {len(self.layer_pattern)} layers of layer_pattern")
        else:
            for name in ("num_dense_layers", "num_shared_experts", "router_bias", "capacity_factor", "expert_dim"):
                _require(not getattr(self, name), name, getattr(self, name), "needs num_experts")
        _require(not self.class_token or self.patch_size > 0, "class_token", self.class_token, "needs patch_size")
        if self.patch_size:
            _require(self.channels in (1, 3), "channels", self.channels, "must be 1 (grey) or 3")
            _require(self.position == "learned" and not self.position_offset, "position", self.position,
                     "must be 'learned', without position_offset, of patches")
            _require(math.isqrt(self.patch_positions) ** 2 == self.patch_positions > 0, "max_seq_len", self.max_seq_len,
                     "must be a square number of patches" + ", and the class token" * self.class_token)
            _require(not self.causal and self.num_experts == 0, "causal", self.causal,
                     "must be False, without num_experts, of patches")
        _require(0 <= self.dropout < 1, "dropout", self.dropout, "must be in [0, 1)")
        scaling = self.rope_scaling.get("type", "none")
        choose(scaling, ("none", *ROPE_SCALINGS), "model.rope_scaling.type")
        known = ROPE_SCALINGS.get(scaling, {})
        for key, value in self.rope_scaling.items():
            choose(key, ("type", *known), "model.rope_scaling")
            number = type(value) in (int, float) and 0 <= value < float("inf")
            _require(key == "type" or number and (value or not known[key]), f"rope_scaling.{key}", value,
                     "must be a positive number")

    @property
    def groups(self) -> int:
        """Query heads per key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def rope_dim(self) -> int:
        """Channels of a head that are rotated."""
        return int(self.head_dim * self.rope_frac)

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """"global" or "local" for each layer."""
        return tuple(self.layer_pattern[i % len(self.layer_pattern)] for i in range(self.num_layers))

    @property
    def has_position_table(self) -> bool:
        return self.position in ("learned", "learned_relative")

    @property
    def has_relative_bias(self) -> bool:
        return self.position in ("relative", "learned_relative")

    @property
    def num_first_layers(self) -> int:
        """Blocks of another kind before the others: of the first of `stacks`, where there are two."""
        return self.num_dense_layers or int(not self.first_norm)

    @property
    def stacks(self) -> tuple[tuple[str, "Architecture", int], ...]:
        """Name of the parameters, what its blocks are, and how many they are: of each run of blocks of one kind."""
        if not self.num_first_layers:
            return ("layers", self, self.num_layers),
        if not self.first_norm:
            pattern = self.layer_pattern[1:] + self.layer_pattern[:1]
            rest = dataclasses.replace(self, first_norm=True, layer_pattern=pattern)
            return (("first_layers", self, 1), ("layers", rest, self.num_layers - 1))[: self.num_layers]
        dense = dataclasses.replace(self, num_dense_layers=0, num_experts=0, expert_dim=0, num_shared_experts=0,
                                    router_bias=False, capacity_factor=0.0)
        return (("first_layers", dense, self.num_dense_layers),
                ("layers", dataclasses.replace(self, num_dense_layers=0), self.num_layers - self.num_dense_layers))

    @property
    def patch_positions(self) -> int:
        """Patches for which there are positions."""
        return self.max_seq_len - self.class_token

    @property
    def active_mlp_dim(self) -> float:
        """Hidden channels of the mlp that a token goes through; with experts, of those that it chooses and the shared.

        The mean over the layers, where some are dense.
        """
        if not self.num_experts:
            return self.mlp_dim
        chosen = self.expert_dim * (self.experts_per_token + self.num_shared_experts)
        return chosen + (self.mlp_dim - chosen) * self.num_dense_layers / self.num_layers

    def param_count(self) -> int:
        """Returns the number of parameters, each counted once (tied embeddings once)."""
        D, F = self.embed_dim, self.mlp_dim
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        norm = D * (2 if self.norm_bias else 1)
        attention = D * (q + 2 * kv) + q * D
        attention += (q + kv + kv * self.key_bias) * self.qkv_bias + D * self.attention_out_bias
        attention += {"none": 0, "head": 2 * self.head_dim, "full": q + kv}[self.qk_norm] * (norm // D)
        mlp = D * F * (3 if self.gated_mlp else 2) + (F * (2 if self.gated_mlp else 1) + D) * self.mlp_bias
        mlps = self.num_layers * mlp
        if self.num_experts:
            experts = self._expert_params(self.num_experts) + self.num_experts * self.router_bias
            mlps = self.num_dense_layers * mlp + (self.num_layers - self.num_dense_layers) * experts
        sublayers = 3 if self.cross_attention else 2
        layer = attention * (sublayers - 1) + self.prompt_tokens * 2 * kv + self.num_heads * (self.prompt_tokens > 0)
        layer += norm * sublayers * (2 if self.norm_position == "sandwich" else 1)
        tables = self.vocab_size * D * (1 if self.tie_embeddings else 2)
        if self.patch_size:
            tables = self._patch_params() + D * (self.patch_bias + self.class_token)
        tables += (self.max_seq_len + self.position_offset) * D * self.has_position_table
        tables += self.relative_buckets * self.num_heads * self.has_relative_bias
        tables += self.num_token_types * D + norm * self.embed_norm
        tables += (D * D + D * self.mlp_bias + norm + self.vocab_size) * self.head_transform
        if self.pooling == "attention":   # a query and a block of its own, without a norm before the attention
            tables += D + attention + norm + mlp
        tables -= norm * (not self.first_norm)
        return self.num_layers * layer + mlps + norm * self.final_norm + tables

    def matmul_param_count(self) -> int:
        """Returns the parameters that multiply a token: no embedding tables, norms, biases, nor experts not chosen."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        attention = self.embed_dim * (2 * q + 2 * kv)
        mlp = self.embed_dim * self.mlp_dim * (3 if self.gated_mlp else 2)
        mlps = self.num_layers * mlp
        if self.num_experts:
            sparse = self.num_layers - self.num_dense_layers
            mlps = self.num_dense_layers * mlp + sparse * self._expert_params(self.experts_per_token)
        attentions = self.num_layers * (2 if self.cross_attention else 1)
        head = self.embed_dim * (self.vocab_size + self.embed_dim * self.head_transform)   # tied or not
        if self.patch_size:
            head = self._patch_params()
        return attentions * attention + mlps + head

    def _patch_params(self) -> int:
        return self.patch_size ** 2 * self.channels * self.embed_dim

    def _expert_params(self, experts: int) -> int:
        """Returns the parameters of a router's matrix, so many experts and the shared ones."""
        one = self.embed_dim * self.expert_dim * (3 if self.gated_mlp else 2)
        return self.embed_dim * self.num_experts + (experts + self.num_shared_experts) * one

    def flops_per_token(self, seq_len: int) -> float:
        """Returns the FLOPs of training on one token of a sequence of `seq_len` (forward and backward).

        Convention: 6 per matmul parameter, the output head included and the embedding gather not;
        attention scores and values 12 * heads * head_dim per key that the mask lets a query see, so
        causal attention counts half of the square and local layers their window; no recomputation.
        """
        attention = 0.0
        for kind in self.layer_kinds:
            span = min(self.window, seq_len) if kind == "local" else seq_len
            # Mean over queries t = 0, 1, ... of the visible keys up to t, min(t + 1, span); both sides if not causal.
            keys = span - span * (span - 1) / (2 * seq_len)
            attention += 12 * self.num_heads * self.head_dim * (keys if self.causal else 2 * keys - 1)
        return 6.0 * self.matmul_param_count() + attention


def encoder_decoder_flops(encoder: Architecture, decoder: Architecture, source_len: int, target_len: int) -> float:
    """Returns the FLOPs of training on one source and its target, by the rules of `flops_per_token`.

    An encoder has no head; of cross attention keys and values are of the source's tokens, all of which a target sees.
    """
    head = 6.0 * encoder.embed_dim * encoder.vocab_size
    kv = 6.0 * 2 * decoder.num_kv_heads * decoder.head_dim * decoder.embed_dim * decoder.num_layers
    scores = 12.0 * decoder.num_heads * decoder.head_dim * decoder.num_layers * source_len
    return (source_len * (encoder.flops_per_token(source_len) - head + kv)
            + target_len * (decoder.flops_per_token(target_len) - kv + scores))


# About the named number of parameters, vocabulary included. 1B and up are the published shapes of
# Llama 3 (arXiv:2407.21783 and the Llama 3.2 model cards); 125m and 350m keep GPT-3's widths
# (arXiv:2005.14165, table 2.1); the rest are scaled for one laptop core to one accelerator.
_LLAMA3 = dict(vocab_size=128256, rope_theta=500000.0, norm_eps=1e-5, max_seq_len=8192, dtype="bfloat16", remat="full",
               loss_chunk_tokens=4096)   # each piece gathers the head
SIZES = {
    "1m": dict(vocab_size=2048, num_layers=4, embed_dim=128, num_heads=4),
    "10m": dict(vocab_size=8192, num_layers=8, embed_dim=288, num_heads=6),
    "30m": dict(vocab_size=16384, num_layers=8, embed_dim=480, num_heads=8),
    "125m": dict(vocab_size=32768, num_layers=12, embed_dim=768, num_heads=12, dtype="bfloat16"),
    "350m": dict(vocab_size=32768, num_layers=24, embed_dim=1024, num_heads=16, dtype="bfloat16"),
    "1b": dict(_LLAMA3, num_layers=16, embed_dim=2048, num_heads=32, num_kv_heads=8, mlp_dim=8192),
    "3b": dict(_LLAMA3, num_layers=28, embed_dim=3072, num_heads=24, num_kv_heads=8, mlp_dim=8192),
    "8b": dict(_LLAMA3, num_layers=32, embed_dim=4096, num_heads=32, num_kv_heads=8, mlp_dim=14336,
               tie_embeddings=False),
    "70b": dict(_LLAMA3, num_layers=80, embed_dim=8192, num_heads=64, num_kv_heads=8, mlp_dim=28672,
                tie_embeddings=False),
    "405b": dict(_LLAMA3, num_layers=126, embed_dim=16384, num_heads=128, num_kv_heads=8, mlp_dim=53248,
                 tie_embeddings=False),
}

# Encoders of text: BERT's shapes (arXiv:1810.04805), and that of all-MiniLM-L6-v2; modern ones of sizes for two cores.
_BERT = dict(vocab_size=30522, max_seq_len=512, norm="layernorm", norm_bias=True, norm_eps=1e-12, norm_position="post",
             final_norm=False, activation="gelu", gated_mlp=False, qkv_bias=True, attention_out_bias=True,
             mlp_bias=True, position="learned", num_token_types=2, embed_norm=True, dropout=0.1, causal=False)
ENCODERS = {
    "tiny": dict(vocab_size=512, num_layers=2, embed_dim=32, num_heads=4, mlp_dim=64, max_seq_len=64, causal=False),
    "demo": dict(vocab_size=4097, num_layers=4, embed_dim=256, num_heads=4, max_seq_len=256, qk_norm="head",
                 causal=False),
    "minilm": dict(_BERT, num_layers=6, embed_dim=384, num_heads=12, mlp_dim=1536),
    "base": dict(_BERT, num_layers=12, embed_dim=768, num_heads=12, mlp_dim=3072),
    "large": dict(_BERT, num_layers=24, embed_dim=1024, num_heads=16, mlp_dim=4096),
}


def _require(condition, name, value, remedy):
    if not condition:
        raise UserError(f"model.{name}={value!r} {remedy}")
