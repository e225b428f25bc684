"""The optimiser of docs/recipe.md in double-precision numpy, one tensor at a time.

Written from the formulas alone, without code of kernels/ or train/. Tensors go by nanochat's names.
"""

import math

import numpy as np

EPS = 1e-10
FLOOR = 1e-6
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
ADAMW = {  # start of the name: (lr, scaled by width, by batch, beta1, beta2, decay)
    "lm_head.": (0.008, True, True, 0.8, 0.96, 0.01),
    "transformer.wte.": (0.3, True, True, 0.8, 0.995, 0.001),
    "value_embeds.": (0.15, True, True, 0.8, 0.995, 0.01),
    "bigram_embed.": (0.3, True, True, 0.75, 0.95, 0.01),
    "bigram_lambdas": (0.004, True, True, 0.9, 0.95, 0.0),
    "resid_lambdas": (0.3 * 0.01, False, True, 0.8, 0.95, 0.05),
    "x0_lambdas": (0.3, False, True, 0.96, 0.95, 0.0),
    "smear_gate.": (0.2, False, False, 0.8, 0.95, 0.0),
    "smear_lambda": (0.2, False, False, 0.8, 0.95, 0.0),
    "backout_lambda": (0.2, False, False, 0.8, 0.95, 0.0),
}


def length(x):
    return np.sqrt((x * x).sum())


def orthogonalize(x, equilibration, muon_plus):
    """Equilibration, Polar Express and Muon+ of a matrix (R, C)."""
    rows, cols = x.shape
    whole = length(x)
    for i in range(rows if equilibration == "row" else 0):
        x[i] = x[i] * (whole / math.sqrt(rows)) / max(length(x[i]), FLOOR)
    for j in range(cols if equilibration == "col" else 0):
        x[:, j] = x[:, j] * (whole / math.sqrt(cols)) / max(length(x[:, j]), FLOOR)
    x = x / (1.01 * length(x) + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x * math.sqrt(min(rows, cols)) / max(length(x), FLOOR) if muon_plus else x


class Reference:
    """Parameters and state of a model, {name: array}; `step` updates them.

    Args:
        tensors: parameters by name, as arrays.
        batch: tokens of a step.
        ratio: D_ref / D, by which Muon's decay is scaled.
        steps: of the whole run.
    """

    def __init__(self, tensors, batch, ratio, steps, equilibration="row", muon_plus=True):
        self.tensors = {name: np.array(x, dtype=np.float64) for name, x in tensors.items()}
        self.width = tensors["transformer.wte.weight"].shape[1]
        self.batch_scale = math.sqrt(batch / 2**19)
        self.ratio, self.steps = ratio, steps
        self.equilibration, self.muon_plus = equilibration, muon_plus
        self.first = {name: np.zeros_like(x) for name, x in self.tensors.items()}
        self.second = dict.fromkeys(self.tensors, 0.0)
        self.count = 0

    def step(self, grads, position):
        """Update every tensor from its gradient with the schedule's values of step `position`."""
        self.count += 1
        warmdown = round(0.65 * self.steps)
        done = max(0, position - (self.steps - warmdown)) / warmdown
        lr_mult = (position + 1) / 40 if position < 40 else (1 - done) + 0.05 * done
        share = position / 400
        mu = 0.85 + 0.12 * share if position < 400 else 0.97 - 0.07 * done
        decay = 0.28 * self.batch_scale * self.ratio
        decay *= (1 + math.cos(math.pi * position / self.steps)) / 2
        for name, p in self.tensors.items():
            g = np.array(grads[name], dtype=np.float64)
            if name.startswith("transformer.h."):
                lr = 0.02 * self.batch_scale * lr_mult
                self.tensors[name] = self._muon(name, p, g, lr, mu, decay)
            else:
                self.tensors[name] = self._adamw(name, p, g, lr_mult)

    def _adamw(self, name, p, g, lr_mult):
        (group,) = (values for start, values in ADAMW.items() if name.startswith(start))
        lr, by_width, by_batch, beta1, beta2, decay = group
        lr *= lr_mult
        if by_width:
            lr *= math.sqrt(768 / self.width)
        if by_batch:
            lr *= self.batch_scale
        p = p * (1 - lr * decay)
        m = self.first[name] = beta1 * self.first[name] + (1 - beta1) * g
        v = self.second[name] = beta2 * self.second[name] + (1 - beta2) * g * g
        m, v = m / (1 - beta1**self.count), v / (1 - beta2**self.count)
        return p - lr * m / (np.sqrt(v) + EPS)

    def _muon(self, name, p, g, lr, mu, decay):
        rows, cols = p.shape
        m = self.first[name] = mu * self.first[name] + (1 - mu) * g
        x = orthogonalize((1 - mu) * g + mu * m, self.equilibration, self.muon_plus)
        squares = (x * x).mean(axis=1 if rows >= cols else 0, keepdims=True)
        s = self.second[name] = 0.9 * self.second[name] + 0.1 * squares
        u = x / np.sqrt(np.maximum(s, 1e-10))
        u = u * length(x) / max(length(u), 1e-10)
        lr *= math.sqrt(max(1, rows / cols))
        return p - lr * u - lr * decay * p * (u * p >= 0)
