"""Use kernels of nanofuse in a PyTorch model of your own.

    python -m examples.own_model

A small language model whose every part is PyTorch's, but for two places where memory and time go:
the add and norm between layers, and the loss, whose logits are never whole. On a CUDA GPU the
kernels run, and without one the same lines in plain PyTorch: `backend` says which, and neither
falls back to the other by itself.
"""

import torch
from torch import nn

from nanofuse import ops

VOCAB, WIDTH, LAYERS = 64, 32, 2


class Model(nn.Module):
    """Predicts a token from those before it: recurrent layers and a head with tied weights."""

    def __init__(self, backend):
        super().__init__()
        self.backend = backend
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(nn.GRU(WIDTH, WIDTH, batch_first=True) for _ in range(LAYERS))

    def forward(
        self,
        tokens,  # (B, T) int64
        targets,  # (B, T) int64
    ):
        """The loss, () in nats per token."""
        x = self.embedding(tokens)  # (B, T, C): the stream
        normed = nn.functional.rms_norm(x, (WIDTH,))
        for layer in self.layers:
            branch = layer(normed)[0]  # (B, T, C)
            # in place of x = x + branch; normed = rms_norm(x): one pass over memory
            x, normed = ops.add_rms_norm(x, branch, backend=self.backend)
        # in place of cross_entropy(15 * tanh(normed @ weight.T / 15), targets)
        return ops.linear_softcap_cross_entropy(
            normed.reshape(-1, WIDTH),
            self.embedding.weight,
            targets.reshape(-1),
            VOCAB,
            backend=self.backend,
        )


def train(backend, device, steps=30):
    """Learn to count; returns the losses of the steps."""
    torch.manual_seed(0)
    model = Model(backend).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    losses = []
    for _ in range(steps):
        start = torch.randint(VOCAB, (4, 1), device=device)
        counting = (start + torch.arange(9, device=device)) % VOCAB  # (4, 9)
        loss = model(counting[:, :-1], counting[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    gpu = torch.cuda.is_available()
    losses = train(*(("kernel", "cuda") if gpu else ("eager", "cpu")))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, {'kernels' if gpu else 'plain PyTorch'}")
