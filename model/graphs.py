"""CUDA graphs, which remove launch overhead and gaps between kernels.

Of the fused micro-step, forward and backward pass are two graphs that share one memory pool; a
batch is copied into their input buffers. All other tensors that they read or write must keep their
addresses: parameters, gradients, the weights' operands, the FP8 scales.
"""

import torch


def captured(function, pool=None):
    """Record the kernels that function() launches. Recording itself runs nothing on the GPU.

    Args:
        function: every kernel of it has run before, because compilation cannot be recorded.
        pool: of the graph's memory. Graphs share one that never run at once, where what one leaves
            there is not needed when another runs that was recorded after it was freed. None: its
            own.

    Returns:
        The CUDAGraph and what the function returned, tensors that a replay writes.
    """
    graph = torch.cuda.CUDAGraph()
    # frees memory cached by eager passes first; other threads may call CUDA meanwhile, as that of
    # NCCL does
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        result = function()
    return graph, result


class GraphedCall:
    """The kernels of one function, in whose place the host launches a CUDA graph from its second
    call on: the first compiles them.

    Args:
        pool: as of `captured`; None: no graph.

    Attributes:
        graph: the CUDAGraph, or None.
    """

    def __init__(self, pool):
        self.pool, self.graph, self.ran = pool, None, False

    def __call__(self, function, settled=True):
        """Run it.

        Args:
            function: the same in every call, without arguments; what it reads and writes stays
                where it is.
            settled: whether it launches the kernels that it launches ever after; other calls do not
                count.
        """
        if not settled or self.pool is None or not self.ran:
            function()
            self.ran = settled
            return
        if self.graph is None:
            self.graph, _ = captured(function, self.pool)
        self.graph.replay()


class GraphedPass:
    """FusedGPT.loss and FusedGPT.backward as recorded graphs, for batches of one shape.

    Every kernel must have run before.

    Args:
        fused: model.fused.FusedGPT.
        tokens, targets: (B, T), an example batch.
    """

    def __init__(self, fused, tokens, targets):
        self.tokens, self.targets = tokens.clone(), targets.clone()
        self.grad_loss = torch.ones((), device=tokens.device)
        forward, (self.mean, state) = captured(lambda: fused.loss(self.tokens, self.targets))
        backward, _ = captured(lambda: fused.backward(state, self.grad_loss), forward.pool())
        self.graphs = forward, backward
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
