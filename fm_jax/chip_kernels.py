"""Attention by the kernels that come with the chips: splash attention on TPU, cuDNN on NVIDIA GPUs. Layer 1.

`kernels.attention` is the one caller, and its reference says what is right. What a kernel cannot compute exactly so it
is not asked for: `refusals` says why. Letters as in `model.py`.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from fm_jax.errors import UserError

LANES = 128          # splash works on blocks of multiples of it
LARGEST_BLOCK = 512  # of queries and of keys, as MaxText has it for every generation; not measured on a TPU here


def check_matmul_dtype(matmul_dtype: str, layout) -> None:
    """Returns nothing. Raises UserError for a `model.matmul_dtype` that the mesh's devices would only imitate.

    A CPU imitates both: it is where one tries things. Every TPU and every NVIDIA GPU of the table of peaks has int8.
    """
    where = layout.platform
    if matmul_dtype != "fp8" or where not in ("tpu", "cuda"):
        return
    device = layout.mesh.devices.flat[0]
    # NVIDIA from compute capability 8.9 (L4, H100); TPUs from the seventh generation.
    able = "TPU7" in device.device_kind if where == "tpu" else float(getattr(device, "compute_capability", 9)) >= 8.9
    if not able:
        raise UserError(f"model.matmul_dtype='fp8': {device.device_kind} has no 8-bit floating point; set it to 'int8' "
                        "or ''")


def refusals(kernel: str, q_BTKGH, k_BSKH, mask, *, softcap: float, platform: str | None, context: int,
             biased: bool = False) -> list[str]:
    """Returns why `kernel`, "splash" or "cudnn", cannot serve this attention, in words; empty where it can.

    q, k: arrays or shape structs. platform: `Layout.platform`. context: into how many parts the mesh cuts a sequence.
    biased: scores have something added to them by distance.
    """
    T, S, H = q_BTKGH.shape[1], k_BSKH.shape[1], q_BTKGH.shape[-1]
    home, dtypes = {"splash": ("tpu", ("bfloat16", "float32")), "cudnn": ("cuda", ("bfloat16", "float16"))}[kernel]
    rules = [
        (platform == home, f"it runs on {home}, and the mesh has devices of {platform or 'no known platform'}"),
        (q_BTKGH.dtype in dtypes, f"it takes {' and '.join(dtypes)}, not model.dtype={q_BTKGH.dtype}"),
        (H % 8 == 0, f"model.head_dim={H} is no multiple of 8"),
        (context == 1, f"it needs whole sequences, and mesh.context={context} cuts them"),
        (not biased, "it has no bias by distance, as model.position='relative' adds to its scores"),
    ]
    if kernel == "splash":
        rules += [
            (T % LANES == 0 and S % LANES == 0, f"lengths must be multiples of {LANES}, not {T} and {S}"),
            (mask.k_first_BS is None, "it has no mask for trees"),
            (mask.q_index_BT is None and mask.k_index_BS is None, "it has no mask by index arrays"),
            (mask.k_prefix_BS is None, "it has no mask with a prefix"),
            # The gradients of such a query would be wrong. A causal one sees itself.
            (mask.causal or mask.q_segments_BT is mask.k_segments_BS,
             "segments in cross attention may leave a query without a key"),
        ]
    else:
        odd = not _by_flags(mask)[1] and (T % 2 or S % 2)
        rules += [
            (not softcap, f"it has no model.attention_softcap, which is {softcap}"),
            (not odd, f"lengths must be even for a mask other than causal, not {T} and {S}"),
        ]
    wrong = [text for holds, text in rules if not holds]
    if kernel == "cudnn" and not wrong:
        try:   # what the library knows: its version, the GPU's generation, its largest head
            jax.eval_shape(lambda q, k: cudnn(q, k, k, mask, scale=1.0), q_BTKGH, k_BSKH)
        except (RuntimeError, NotImplementedError) as e:
            wrong = [str(e)]
    return wrong


def splash(q_BTKGH, k_BSKH, v_BSKH, mask, *, scale: float, softcap: float = 0.0, layout=None, interpret: bool = False):
    """Returns the attention output [B, T, K, G, H] of JAX's splash attention, scores and softmax in float32.

    Blocks that no query sees are skipped in both passes, and the scores are never in HBM. q is multiplied by `scale`
    in its own dtype: exact where that is a power of two, else one more rounding. interpret: for tests on a CPU.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as library   # a second to import

    T, S = q_BTKGH.shape[1], k_BSKH.shape[1]
    back = None if not mask.window else mask.window - 1
    if mask.window or mask.causal:
        pairs = library.LocalMask((T, S), (back, 0 if mask.causal else back), offset=0)
    else:
        pairs = library.FullMask((T, S))
    rows, columns = (next(n for n in range(LARGEST_BLOCK, 0, -LANES) if length % n == 0) for length in (T, S))
    blocks = library.BlockSizes(rows, columns, block_q_dkv=rows, block_kv_dkv=columns, block_q_dq=rows,
                                block_kv_dq=columns)

    def local(q, k, v, *segments):
        b, _, K, G, H = q.shape
        q = (q * jnp.asarray(scale, q.dtype)).transpose(0, 2, 3, 1, 4).reshape(b, K * G, T, H)
        kernel = library.make_splash_mha(
            library.MultiHeadMask([pairs] * (K * G)), block_sizes=blocks, head_shards=1, q_seq_shards=1,
            attn_logits_soft_cap=softcap or None, interpret=interpret)
        ids = [library.SegmentIds(*segments)] if segments else []
        out = jax.vmap(kernel)(q, k.swapaxes(1, 2), v.swapaxes(1, 2), *ids)
        return out.reshape(b, K, G, T, H).transpose(0, 3, 1, 2, 4)

    segments = [] if mask.q_segments_BT is None else [mask.q_segments_BT, mask.k_segments_BS]
    return _on_each_device(local, layout, q_BTKGH, k_BSKH, v_BSKH, *segments)


def cudnn(q_BTKGH, k_BSKH, v_BSKH, mask, *, scale: float, layout=None, implementation: str = "cudnn"):
    """Returns the attention output [B, T, K, G, H] of cuDNN's flash attention, scores and softmax in float32.

    Causality and its window are options of the kernel, which skips what they hide. The rest of a mask, segments too, is
    an array [B, 1, T, S] that is added to the scores: exact, but every block that it hides is computed.
    implementation: "xla" computes from the same arguments, for tests without a GPU.
    """
    causal, rest_empty = _by_flags(mask)
    rest = mask._replace(causal=False, window=0) if causal else mask
    arrays = {name: a for name, a in rest._asdict().items() if name[1] == "_" and a is not None}
    window = (mask.window - 1, 0) if causal and mask.window else None

    def local(q, k, v, *parts):
        b, T, K, G, H = q.shape
        seen = None if rest_empty else rest._replace(**dict(zip(arrays, parts))).visible(T, k.shape[1])
        out = jax.nn.dot_product_attention(
            q.reshape(b, T, K * G, H), k, v, mask=None if seen is None else seen[:, None], scale=scale,
            is_causal=causal, local_window_size=window, implementation=implementation)
        return out.reshape(q.shape)

    return _on_each_device(local, layout, q_BTKGH, k_BSKH, v_BSKH, *arrays.values())


def _by_flags(mask) -> tuple[bool, bool]:
    """Returns (whether cuDNN's causal option, with its window, says a part of the mask, whether nothing remains)."""
    plain = all(a is None for a in (mask.k_prefix_BS, mask.q_index_BT, mask.k_index_BS, mask.k_first_BS))
    causal = mask.causal and plain
    return causal, plain and mask.q_segments_BT is None and (causal or not mask.window)


def _on_each_device(f, layout, q_BTKGH, k_BSKH, v_BSKH, *rows):
    """Returns f(q, k, v, *rows), on each device for the sequences and heads that it has: XLA cannot cut a kernel."""
    if layout is None:
        return f(q_BTKGH, k_BSKH, v_BSKH, *rows)
    spec = lambda a, *axes: layout.spec(axes, a.shape, activation=True, what="attention")
    q_spec = spec(q_BTKGH, "batch", "length", "kv_heads", "groups", "head")
    k_spec = spec(k_BSKH, "batch", "length", "kv_heads", "head")
    row_specs = [PartitionSpec() if len(a) == 1 else spec(a, "batch", None) for a in rows]
    return layout.on_each_device(f, (q_spec, k_spec, k_spec, *row_specs), q_spec)(q_BTKGH, k_BSKH, v_BSKH, *rows)
