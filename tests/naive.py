"""A Transformer language model in plain NumPy float64, one token and one head at a time: the tests' reference.

Written from the papers, not from `fm_jax.model`: loops instead of einsums, complex numbers instead of
rotation formulas, no masks as arrays but a rule asked for each pair of tokens. It shares only the names
of the parameters.
"""

import math

import numpy as np

_erf = np.vectorize(math.erf)


def activation(name, x):
    return {"gelu": lambda: x * 0.5 * (1 + _erf(x / math.sqrt(2))),
            "gelu_tanh": lambda: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3))),
            "silu": lambda: x / (1 + np.exp(-x)),
            "quick_gelu": lambda: x / (1 + np.exp(-1.702 * x)),
            "relu": lambda: np.maximum(x, 0)}[name]()


def norm(a, p, x):
    scale = p["scale"] + (1 if a.norm_zero_centered else 0)
    if a.norm == "layernorm":
        x = x - x.mean()
    return x / math.sqrt((x ** 2).mean() + a.norm_eps) * scale + p.get("bias", 0)


def rope_frequency(a, local, i):
    """Returns (radians per position of channel pair i, factor on the rotated vector)."""
    dim = a.rope_dim
    if local and a.rope_local_theta:
        return a.rope_local_theta ** (-2 * i / dim), 1.0
    f, s = a.rope_theta ** (-2 * i / dim), a.rope_scaling
    if s["type"] == "linear":
        return f / s["factor"], 1.0
    if s["type"] == "llama3":
        wavelength, old = 2 * math.pi / f, s["original_max_seq_len"]
        if wavelength < old / s["high_freq_factor"]:
            return f, 1.0
        if wavelength > old / s["low_freq_factor"]:
            return f / s["factor"], 1.0
        smooth = (old / wavelength - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])
        return (1 - smooth) * f / s["factor"] + smooth * f, 1.0
    if s["type"] == "yarn":
        find = lambda turns: dim * math.log(s["original_max_seq_len"] / (turns * 2 * math.pi)) / (2 * math.log(a.rope_theta))
        fast, slow = find(s.get("beta_fast", 32)), find(s.get("beta_slow", 1))
        low, high = max(math.floor(fast), 0), min(math.ceil(slow), dim - 1)
        ramp = min(max((i - low) / max(high - low, 1e-3), 0), 1)
        factor = s.get("attention_factor") or 0.1 * math.log(s["factor"]) + 1
        return f / s["factor"] * ramp + f * (1 - ramp), factor
    return f, 1.0


def rope(a, local, x, position):
    x, half = x.copy(), a.rope_dim // 2
    for i in range(half):
        f, factor = rope_frequency(a, local, i)
        z = complex(x[i], x[i + half]) * np.exp(1j * f * position) * factor
        x[i], x[i + half] = z.real, z.imag
    return x


def relative_bucket(a, ahead):
    """Returns which of the buckets a key has that is so many places ahead of its query (arXiv:1910.10683, 2.1)."""
    count, first = a.relative_buckets, 0
    if not a.causal:
        count //= 2
        first = count if ahead > 0 else 0
        ahead = -abs(ahead)
    away = max(-ahead, 0)
    if away < count // 2:
        return first + away
    share = math.log(away / (count // 2)) / math.log(a.relative_max_distance / (count // 2))
    return first + min(count // 2 + int(share * (count - count // 2) + 1e-9), count - 1)


def attention(a, p, xs, sources, sees, positions, local, cross, relative=None):
    """One sublayer over a list of vectors; `sees(t, s)` says which source each query may look at."""
    scale = a.attention_scale or a.head_dim ** -0.5
    project = lambda x, w, b: np.tensordot(x, p[w], 1) + p.get(b, 0)
    q = [project(x, "wq", "q_bias") for x in xs]
    k = [project(x, "wk", "k_bias") for x in sources]
    v = [project(x, "wv", "v_bias") for x in sources]
    if a.qk_norm == "head":
        q = [np.stack([np.stack([norm(a, p["q_norm"], h) for h in g]) for g in x]) for x in q]
        k = [np.stack([norm(a, p["k_norm"], h) for h in x]) for x in k]
    if a.qk_norm == "full":
        q = [norm(a, p["q_norm"], x.reshape(-1)).reshape(x.shape) for x in q]
        k = [norm(a, p["k_norm"], x.reshape(-1)).reshape(x.shape) for x in k]
    outs = []
    for t in range(len(xs)):
        heads = np.zeros((a.num_kv_heads, a.groups, a.head_dim))
        keys = [s for s in range(len(sources)) if sees(t, s)]
        for n in range(a.num_kv_heads):
            for g in range(a.groups):
                turn = lambda x, i: x if cross or a.position != "rope" else rope(a, local, x, positions[i])
                scores = np.array([turn(q[t][n, g], t) @ turn(k[s][n], s) * scale for s in keys])
                if a.attention_softcap:
                    scores = a.attention_softcap * np.tanh(scores / a.attention_softcap)
                if relative is not None and not cross:
                    scores = scores + [relative[relative_bucket(a, s - t), n, g] for s in keys]
                e = np.exp(scores - scores.max())
                heads[n, g] = sum(w * v[s][n] for w, s in zip(e / e.sum(), keys))
        outs.append(np.tensordot(heads, p["wo"], 3) + p.get("o_bias", 0))
    return outs


def mlp(a, p, x):
    h = x @ p["w_up"] + p.get("up_bias", 0)
    gate = activation(a.activation, x @ p["w_gate"] + p.get("gate_bias", 0)) if a.gated_mlp else None
    h = gate * h if a.gated_mlp else activation(a.activation, h)
    return h @ p["w_down"] + p.get("down_bias", 0)


def moe(a, p, xs, segments):
    """One sublayer of experts over a list of vectors: token by token, expert by expert."""
    room = min(len(xs), math.ceil(a.capacity_factor * len(xs) * a.experts_per_token / a.num_experts))
    taken, ys = [0] * a.num_experts, []
    for t, x in enumerate(xs):
        y = np.zeros_like(x)
        if segments is None or segments[t] != 0:
            logits = x @ p["router"]
            e = np.exp(logits - logits.max())
            scores = e / e.sum() if a.router_score == "softmax" else 1 / (1 + np.exp(-logits))
            order = sorted(range(a.num_experts), key=lambda i: -(scores + p.get("router_bias", 0))[i])
            chosen = order[:a.experts_per_token]
            total = sum(scores[i] for i in chosen) if a.router_renormalize else 1
            for i in chosen:
                taken[i] += 1
                if not a.capacity_factor or taken[i] <= room:
                    expert = {name: p[name][i] for name in ("w_up", "w_gate", "w_down") if name in p}
                    y += a.router_scale * scores[i] / total * mlp(a, expert, x)
        ys.append(y + mlp(a, p["shared"], x) if a.num_shared_experts else y)
    return ys


def stack(a, p, xs, segments=None, positions=None, prefix=None, context=None, context_segments=None):
    """Returns the outputs of the whole stack for one sequence of vectors."""
    positions = list(range(len(xs))) if positions is None else positions
    for l in range(a.num_layers):
        apart = a.num_dense_layers or int(not a.first_norm)
        layer = _index(p["first_layers"], l) if l < apart else _index(p["layers"], l - apart)
        local = a.layer_pattern[l % len(a.layer_pattern)] == "local"

        def sees(t, s):
            return ((not a.causal or s <= t or (prefix is not None and prefix[s]))
                    and (not local or abs(t - s) < a.window)
                    and (segments is None or segments[t] == segments[s]))

        def cross_sees(t, s):
            return context_segments is None or context_segments[s] == (1 if segments is None else segments[t])

        def sublayer(xs, name, f, read=None):
            n = layer.get(f"{name}_norm")
            read = xs if read is None else read
            bare = not a.first_norm and l == 0 and name == "attention"
            ys = f([norm(a, n, x) for x in read] if a.norm_position in ("pre", "sandwich") and not bare else read)
            if a.norm_position in ("sandwich", "output"):
                ys = [norm(a, layer[f"{name}_out_norm"], y) for y in ys]
            ys = [x + y for x, y in zip(xs, ys)]
            return [norm(a, n, y) for y in ys] if a.norm_position == "post" else ys

        entered = xs
        xs = sublayer(xs, "attention", lambda v: attention(a, layer["attention"], v, v, sees, positions, local, False,
                                                         p.get("relative_bias")))
        if a.cross_attention:
            xs = sublayer(xs, "cross", lambda v: attention(a, layer["cross"], v, context, cross_sees, None, local, True))
        mix = lambda v: moe(a, layer["moe"], v, segments) if "moe" in layer else [mlp(a, layer["mlp"], x) for x in v]
        xs = sublayer(xs, "mlp", mix, entered if a.parallel_residual else None)
    return [norm(a, p["final_norm"], x) for x in xs] if a.final_norm else xs


def logits(a, p, tokens, segments=None, positions=None, **kwargs):
    """Returns float64 [T, V] logits of one sequence of token ids."""
    positions = list(range(len(tokens))) if positions is None else positions
    p = _float64(p)
    xs = []
    for t, position in zip(tokens, positions):
        x = p["embed"]["tokens"][t] * a.embed_scale
        if a.position.startswith("learned"):
            x = x + p["embed"]["positions"][position + a.position_offset]
        if a.position == "sinusoidal":
            angles = [position / 10000 ** (2 * i / a.embed_dim) for i in range(a.embed_dim // 2)]
            x = x + np.array([math.sin(v) for v in angles] + [math.cos(v) for v in angles])
        if a.num_token_types:
            x = x + p["embed"]["types"][0]
        xs.append(norm(a, p["embed"]["norm"], x) if a.embed_norm else x)
    xs = stack(a, p["transformer"], xs, segments, positions, **kwargs)
    xs = [x * a.logit_scale for x in xs]
    table = p["embed"]["tokens" if a.tie_embeddings else "head"]
    if a.head_transform:
        e = p["embed"]
        xs = [norm(a, e["transform_norm"], activation(a.activation, x @ e["transform"] + e.get("transform_bias", 0))) for x in xs]
    out = np.stack([table @ x for x in xs]) + (p["embed"]["head_bias"] if a.head_transform else 0)
    return a.logit_softcap * np.tanh(out / a.logit_softcap) if a.logit_softcap else out


def _index(tree, i):
    return {k: _index(v, i) for k, v in tree.items()} if isinstance(tree, dict) else tree[i]


def _float64(tree):
    return {k: _float64(v) for k, v in tree.items()} if isinstance(tree, dict) else np.asarray(tree, np.float64)
