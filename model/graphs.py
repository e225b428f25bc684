"""The fused micro-step as CUDA graphs: no launch overhead, no gaps between kernels.

Forward and backward are two graphs that share one memory pool; the input is copied in. Everything
that they touch stays where it is: parameters, their gradients, the products' operands, the scales.
"""

import torch


class GraphedPass:
    """FusedGPT.loss and backward, recorded for batches of one shape.

    Every kernel must have run before, as compiling is not recorded. Recording runs nothing.

    Args:
        fused: model.fused.FusedGPT.
        tokens, targets: (B, T), an example batch.
    """

    def __init__(self, fused, tokens, targets):
        self.tokens, self.targets = tokens.clone(), targets.clone()
        self.grad_loss = torch.ones((), device=tokens.device)
        self.graphs = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graphs[0]):  # frees what eager passes left in the cache first
            self.mean, state = fused.loss(self.tokens, self.targets)
        with torch.cuda.graph(self.graphs[1], pool=self.graphs[0].pool()):
            fused.backward(state, self.grad_loss)
        self.runs = 0

    def loss(
        self,
        tokens,  # (B, T)
        targets,  # (B, T)
    ):
        """Loss () and a ticket for `backward`.

        Raises:
            ValueError: a batch of another shape than the recorded one.
        """
        if tokens.shape != self.tokens.shape:
            raise ValueError(
                f"CUDA graphs were recorded for batches of {tuple(self.tokens.shape)}, not "
                f"{tuple(tokens.shape)}; run that batch without them"
            )
        self.tokens.copy_(tokens)
        self.targets.copy_(targets)
        self.graphs[0].replay()
        self.runs += 1
        return self.mean.clone(), self.runs

    def backward(
        self,
        ticket,
        grad_loss,  # ()
    ):
        """Add the gradients of grad_loss * loss.

        Raises:
            RuntimeError: another forward pass ran since the ticket's.
        """
        if ticket != self.runs:
            raise RuntimeError("under CUDA graphs a loss must be differentiated before the next")
        self.grad_loss.copy_(grad_loss)
        self.graphs[1].replay()
