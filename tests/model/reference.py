"""The forward pass of docs/recipe.md in double-precision numpy, one position at a time.

Written from the formulas alone, without code of model/ or kernels/. Takes a checkpoint's tensors,
by their nanochat names.
"""

import math

import numpy as np


def rms(x):
    return x / np.sqrt((x * x).mean() + 2.0**-23)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def rotate(x, position):
    half = len(x) // 2
    y = np.empty_like(x)
    for i in range(half):
        angle = position * 100_000 ** (-2 * i / len(x))
        c, s = math.cos(angle), math.sin(angle)
        y[i] = x[i] * c + x[i + half] * s
        y[i + half] = -x[i] * s + x[i + half] * c
    return y


def reference_logits(tensors, config, tokens):
    """Softcapped logits (T, V) of one row of tokens (list of int)."""
    w = {name: np.asarray(tensor, dtype=np.float64) for name, tensor in tensors.items()}
    layers, heads, kv_heads = config["n_layer"], config["n_head"], config["n_kv_head"]
    width, length = config["n_embd"], len(tokens)
    size = width // heads
    short = math.ceil(math.ceil(config["sequence_len"] / 4) / 128) * 128
    pattern = config["window_pattern"]

    embedding = [rms(w["transformer.wte.weight"][t]) for t in tokens]
    x = [embedding[0]]
    for t in range(1, length):
        gate = sigmoid(w["smear_gate.weight"][0] @ embedding[t][:24])
        x.append(embedding[t] + w["smear_lambda"][0] * gate * embedding[t - 1])
    x0 = list(x)
    table = w.get("bigram_embed.weight")
    for layer in range(layers):
        prefix = f"transformer.h.{layer}."
        long = layer == layers - 1 or pattern[layer % len(pattern)] == "L"
        window = config["sequence_len"] if long else short
        q, k, v = [], [], []
        for t in range(length):
            x[t] = w["resid_lambdas"][layer] * x[t] + w["x0_lambdas"][layer] * x0[t]
            if table is not None:
                row = len(table) - 1
                if t > 0:
                    row = ((36313 * tokens[t]) ^ (27191 * tokens[t - 1])) % (len(table) - 1)
                x[t] = x[t] + w["bigram_lambdas"][layer] * table[row]
            h = rms(x[t])
            split = {
                name: (w[f"{prefix}attn.{name}.weight"] @ h).reshape(-1, size)
                for name in ("c_q", "c_k", "c_v")
            }
            q.append([1.2 * rms(rotate(head, t)) for head in split["c_q"]])
            k.append([1.2 * rms(rotate(head, t)) for head in split["c_k"]])
            if layer % 2 == (layers - 1) % 2:
                gate = 3 * sigmoid(w[f"{prefix}attn.ve_gate.weight"] @ h[:12])
                extra = w[f"value_embeds.{layer}.weight"][tokens[t]].reshape(kv_heads, size)
                split["c_v"] = split["c_v"] + gate[:, None] * extra
            v.append(split["c_v"])
        for t in range(length):
            y = []
            for head in range(heads):
                kv = head // (heads // kv_heads)
                seen = range(max(0, t - window), t + 1)
                scores = np.array([q[t][head] @ k[j][kv] for j in seen]) / math.sqrt(size)
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                y.append(sum(a * v[j][kv] for a, j in zip(weights, seen, strict=True)))
            x[t] = x[t] + w[f"{prefix}attn.c_proj.weight"] @ np.concatenate(y)
        for t in range(length):
            hidden = np.maximum(w[f"{prefix}mlp.c_fc.weight"] @ rms(x[t]), 0) ** 2
            x[t] = x[t] + w[f"{prefix}mlp.c_proj.weight"] @ hidden
        if layer == layers // 2:
            middle = list(x)
    logits = []
    for t in range(length):
        h = rms(x[t] - w["backout_lambda"][0] * middle[t])
        z = (w["lm_head.weight"] @ h)[: config["vocab_size"]]
        logits.append(15 * np.tanh(z / 15))
    return np.stack(logits)
