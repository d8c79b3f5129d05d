"""Speech to text, in the shapes of Whisper (arXiv:2212.04356).

    python -m fm_jax.prepare --examples --source speech.jsonl --output data/speech      # {"audio": path, "text": ...}
    python -m fm_jax.train --config configs/speech.py:base --workdir runs/speech --config.data.train=data/speech \
        --config.data.tokenizer=path/to/whisper --config.checkpoint.init_from=runs/whisper

The tokenizer is one with the special tokens of Whisper, as its published folders have. The encoder is as the decoder but
for what `c.encoder` names.
"""

from fm_jax import config as fm_config
from fm_jax.errors import choose

_WHISPER = dict(vocab_size=51865, max_seq_len=448, dtype="bfloat16", remat="dots")
SIZES = {   # layers of each stack, width, heads
    "whisper_tiny": dict(_WHISPER, num_layers=4, embed_dim=384, num_heads=6),
    "whisper_base": dict(_WHISPER, num_layers=6, embed_dim=512, num_heads=8),
    "whisper_small": dict(_WHISPER, num_layers=12, embed_dim=768, num_heads=12),
    "whisper_medium": dict(_WHISPER, num_layers=24, embed_dim=1024, num_heads=16),
    "whisper_large": dict(_WHISPER, num_layers=32, embed_dim=1280, num_heads=20, vocab_size=51866),   # large-v3
    "tiny": dict(vocab_size=128, num_layers=2, embed_dim=32, num_heads=4, max_seq_len=16),
}


def get_config(size: str = "whisper_base"):
    """Returns the config of a size: tiny (tests), whisper_tiny, whisper_base, ..., whisper_large (large-v3)."""
    choose(size, SIZES, "size of configs/speech.py")
    c = fm_config.defaults()
    c.name = f"speech:{size}"
    c.objective = "fm_jax.objectives.speech.SpeechRecognition"
    # c.objective_args: num_mels (80), language ("en"), task ("transcribe"), suppress_ids, begin_suppress_ids,
    # target_length (0: max_seq_len), z_loss (0); see the objective's file.
    if size == "whisper_large":
        c.objective_args.num_mels = 128
    c.data.train = "data/speech"
    c.model.update(cross_attention=True, position="learned", norm="layernorm", norm_bias=True, norm_eps=1e-5,
                   gated_mlp=False, activation="gelu", qkv_bias=True, key_bias=False, attention_out_bias=True,
                   mlp_bias=True, **SIZES[size])
    c.encoder.update(max_seq_len=40 if size == "tiny" else 1500, position="none")   # of 20 ms each
    c.seq_len = c.model.max_seq_len
    c.optimizer.no_decay = (".*(scale|bias)", "stem.positions")   # these are fixed
    if size == "tiny":
        c.steps, c.batch_size, c.log.every = 20, 4, 5
    else:
        c.steps, c.batch_size = 2 ** 20, 256   # as there
        c.optimizer.learning_rate, c.optimizer.warmup_steps, c.optimizer.schedule = 1e-3, 2048, "linear"
        c.optimizer.b2, c.optimizer.eps = 0.98, 1e-6
    return c
