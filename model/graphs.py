"""The fused micro-step as CUDA graphs, which removes launch overhead and gaps between kernels.

Forward and backward pass are two graphs that share one memory pool; a batch is copied into their
input buffers. All other tensors that they read or write must keep their addresses: parameters,
gradients, the weights' operands, the FP8 scales.
"""

import torch


class GraphedPass:
    """FusedGPT.loss and FusedGPT.backward as recorded graphs, for batches of one shape.

    Every kernel must have run before, because compilation cannot be recorded. Recording itself
    runs nothing on the GPU.

    Args:
        fused: model.fused.FusedGPT.
        tokens, targets: (B, T), an example batch.
    """

    def __init__(self, fused, tokens, targets):
        self.tokens, self.targets = tokens.clone(), targets.clone()
        self.grad_loss = torch.ones((), device=tokens.device)
        self.graphs = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # other threads may call CUDA meanwhile, as that of NCCL does
        mode = {"capture_error_mode": "thread_local"}
        with torch.cuda.graph(self.graphs[0], **mode):  # first frees memory cached by eager passes
            self.mean, state = fused.loss(self.tokens, self.targets)
        with torch.cuda.graph(self.graphs[1], pool=self.graphs[0].pool(), **mode):
            fused.backward(state, self.grad_loss)
        self.runs = 0

    def loss(
        self,
        tokens,  # (B, T)
        targets,  # (B, T)
    ):
        """Replay the forward pass: the loss () and a ticket for `backward`.

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
        """Replay the backward pass: accumulate the gradient of grad_loss * loss.

        Args:
            ticket: from the `loss` call whose loss is differentiated.

        Raises:
            RuntimeError: another forward pass has run since, and overwritten the saved activations.
        """
        if ticket != self.runs:
            raise RuntimeError("under CUDA graphs a loss must be differentiated before the next")
        self.grad_loss.copy_(grad_loss)
        self.graphs[1].replay()
