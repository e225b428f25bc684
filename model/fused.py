"""The GPT's training pass on Triton kernels, with a hand-written forward and backward pass.

FusedGPT computes what GPT.forward (model/gpt.py) defines, and its gradients, without autograd. It
is a list of the fused pieces of model/pieces/, run forwards and backwards; what they hand to each
other is in model/pieces/stream.py. Autograd passes plain tensors between functions; here a norm's
backward kernel hands the gradient to the GEMMs before it as an FP8 operand in two layouts, the
gradients of x0, the table rows and the lambdas are summed over all layers in one pass, and weight
gradients accumulate inside the GEMMs. tests/model/pieces/ compares every piece with its module,
tests/model/test_fused.py the loss and the gradient of every parameter with the GPT's.
"""

import torch
from torch import nn

import nanofuse.kernels
from nanofuse.kernels.common.ahead import name_kernels
from nanofuse.kernels.common.fp8 import E4M3, E5M2, MULTIPLE, Scaling
from nanofuse.kernels.common.ptx import INTERPRETED
from nanofuse.kernels.embedding_grad import sort_rows
from nanofuse.kernels.softcap_cross_entropy import IGNORE_INDEX
from nanofuse.model.fp8.operands import Operands
from nanofuse.model.fp8.precision import Precision
from nanofuse.model.fp8.products import PlainGemm
from nanofuse.model.fp8.scaling import DelayedScaling, Unscaled
from nanofuse.model.fp8.shapes import in_one, product_shapes
from nanofuse.model.fp8.weights import Weights
from nanofuse.model.graphs import GraphedPass
from nanofuse.model.pieces.attention import FusedAttention
from nanofuse.model.pieces.embedding import FusedEmbedding
from nanofuse.model.pieces.head import FusedHead
from nanofuse.model.pieces.mix import FusedBackout, FusedMiddle, FusedMix, FusedNorm
from nanofuse.model.pieces.mlp import FusedMLP
from nanofuse.model.pieces.stream import MicroStep

EVALUATION = Precision(PlainGemm(), Unscaled())


def kernels_are_interpreted():
    """Whether the kernels run in Triton's interpreter, on a CPU: slow, for tests."""
    return INTERPRETED.value


def fp8_fits(config, tokens):
    """Whether the FP8 kernels support the sizes of a GPTConfig with `tokens` positions per
    micro-step."""
    sizes = (tokens, config.n_embd, config.kv_dim)
    head = config.head_dim
    return not any(size % MULTIPLE for size in sizes) and head >= 32 and head & (head - 1) == 0


def fused_pieces(model, rotary=None, attentions=None, mlp=FusedMLP):
    """The pieces of a GPT in the order of its forward pass; the last one is the head.

    Args:
        rotary: cos and sin (>= T, D), and attentions: a backend for each layer; None: the model's.
        mlp: class of the MLP's piece.
    """
    config, pieces = model.config, model.pieces
    rotary = rotary or (model.cos, model.sin)
    attentions = attentions or [model.attention] * config.n_layer
    found = [FusedEmbedding(pieces.embedding)]
    for layer, block in enumerate(model.transformer.h):
        values = None
        if layer in config.value_embed_layers:
            values = model.value_embeds[str(layer)].weight
        found += [
            FusedMix(pieces.mix, pieces.tables, layer),
            FusedAttention(block.attn, values, rotary, attentions[layer], config),
            FusedNorm(),
            mlp(block.mlp, layer),
        ]
        if layer == config.middle_layer:
            found.append(FusedMiddle(pieces.mix, pieces.backout, layer))
    return [*found, FusedBackout(pieces.backout, config), FusedHead(pieces.head)]


def fp8_order(item):
    """Sort key of (name, dtype) of an FP8 tensor: those of no layer first, then layer by layer, in
    each activations before gradients. The scales in a checkpoint have that order."""
    name, _ = item
    kind, _, layer = name.partition(".")
    return int(layer) if layer else -1, kind.startswith("grad_")


class _Loss(torch.autograd.Function):
    """Connects the hand-written backward pass to autograd, so that loss.backward() works as for any
    model. The pass accumulates into the parameters' .grad itself; `anchor`, any parameter, only
    makes autograd call it."""

    @staticmethod
    def forward(ctx, anchor, forward, backward, tokens, targets):
        loss, ctx.state = forward(tokens, targets)
        ctx.run = backward
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss):
        state, ctx.state = ctx.state, None
        if state is None:
            raise RuntimeError("the fused loss can be differentiated once; compute it again")
        ctx.run(state, grad_loss)
        return None, None, None, None, None


class FusedGPT(nn.Module):
    """A GPT whose training pass runs on the kernels.

    Called like the GPT: fused(tokens, targets, reduction). In training mode with gradients enabled
    it returns the mean loss, whose backward() accumulates every parameter's gradient into .grad.
    These .grad tensors are allocated here once; clear them in place. Otherwise it evaluates, with
    plain products in the activations' dtype. Between passes the weights may change in place, which
    torch counts; a kernel that writes them reports it by torch.autograd.graph.increment_version.

    Args:
        model: GPT; its matrices become views of the stacks of model.fp8.weights.Weights.
        gemm: a provider of model.fp8.products.
        graphs: record CUDA graphs of the training pass once the FP8 scales are known, and with
            several ranks of making operands and of the updates.
        peers: model.fp8.peers.Peers, where several ranks share the optimiser. Every rank then makes
            its FusedGPT at once, and what is not a rank's own leaves its memory: evaluation in FP8,
            and what else reads the parameters, goes within `gathered`.

    Raises:
        ValueError: a width that the MLP's kernel does not take.
    """

    def __init__(self, model, gemm, graphs=False, peers=None):
        super().__init__()
        config = model.config
        if config.n_embd % MULTIPLE:
            raise ValueError(
                f"the fused pass needs a width that is a multiple of {MULTIPLE}, "
                f"not {config.n_embd}; change head_dim"
            )
        name_kernels(nanofuse.kernels.common, nanofuse.kernels)  # as whoever compiled them ahead
        self.graphs, self.graphed = graphs, None
        self.ran = False  # whether a whole training pass has run in this process
        pieces = fused_pieces(model)
        self.model = model
        self.weights = Weights(pieces, model.dtype, peers)
        *self.pieces, self.head = pieces
        for p in model.parameters():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        scaling, norm_scaling, device = Unscaled(), None, model.cos.device
        if gemm.fp8:
            tensors = [item for piece in pieces for item in piece.fp8.items()]
            names = self.weights.fp8_names() | dict(sorted(tensors, key=fp8_order))
            formats = {E4M3: E4M3, E5M2: gemm.gradients}  # of activations, of gradients
            names = {name: formats[dtype] for name, dtype in names.items()}
            scaling = DelayedScaling(names, device, peers and peers.maximum)
            # no element of C normalised ones exceeds sqrt(C): a static scale
            norm_scaling = Scaling.from_bound(config.n_embd**0.5, E4M3, device)
        self.precision = Precision(gemm, scaling, norm_scaling)
        # one GPU's host is ahead of it by many micro-steps: more graphs would only take memory
        self.pool = torch.cuda.graph_pool_handle() if graphs and peers else None
        self.operands = Operands(self.weights, scaling, self.pool)
        self.operands.follow()

    def describe(
        self,
        positions,  # of a micro-step
    ):
        """One line for the log: which kernels run, and which do not and why."""
        ops = list(dict.fromkeys(op for piece in [*self.pieces, self.head] for op in piece.ops))
        off, config = [], self.model.config
        if not self.precision.gemm.fp8:
            ops.remove("quantize")
            off.append("quantize (no FP8)")
        else:
            args = config.head_dim, self.model.cos.device
            found = (in_one(x, *args) for x in product_shapes(config, positions))
            ops += [op for op in found if op]
        if not config.table_rows:
            off.append("lookups (dense model)")
        return f"on: {', '.join(ops)}; off: {', '.join(off) or 'none'}"

    def fp8_clipped(self):
        """How many times a tensor exceeded its FP8 range in an optimiser step and was clipped, over
        all tensors and the steps of this process; None without FP8. Synchronises with the GPU."""
        self.operands.follow()  # counts those of the latest step
        clipped = self.precision.scaling.clipped
        return None if clipped is None else clipped.item()

    def lse_range(self):
        """Smallest and largest logsumexp of a position's softcapped logits in the latest training
        pass: in FP8, what is far below the largest loses precision in lm_head's gradient
        (kernels/linear_softcap_cross_entropy.py). Synchronises with the GPU."""
        return self.head.lse_range.tolist()

    def forward(
        self,
        tokens,  # (B, T) integer
        targets,  # (B, T) int64 in [0, vocab_size), or -1: ignored
        reduction="mean",
    ):
        """Mean loss in nats, (), or with reduction "none" the losses of all positions, (B*T,).

        Another target, and a token outside of the embedding table, give NaN: loss and gradients.

        Raises:
            ValueError: another reduction, or "none" in training, which needs the mean.
        """
        if reduction not in ("mean", "none"):
            raise ValueError(f"unknown reduction {reduction!r}; choose from mean, none")
        self.operands.follow()
        if self.training and torch.is_grad_enabled():
            if reduction == "none":
                raise ValueError("the fused training pass gives the mean loss only")
            self.operands.recorded = True
            if self.graphed is None and self._may_record():
                self.graphed = GraphedPass(self, tokens, targets)
            one_pass = self if self.graphed is None else self.graphed
            pair = one_pass.loss, one_pass.backward
            return _Loss.apply(self.model.backout_lambda, *pair, tokens, targets)
        losses = self._evaluate(tokens, targets)
        if reduction == "none":
            return losses
        return losses.sum() / (targets != IGNORE_INDEX).sum()

    def _may_record(self):
        """Whether to record CUDA graphs now: every kernel has run (so that it is compiled) in this
        process, and FP8 calibration, which runs kernels twice, is over."""
        return self.graphs and self.ran and self.operands.settled

    @torch.no_grad()
    def loss(
        self,
        tokens,  # (B, T)
        targets,  # (B, T)
    ):
        """Forward pass of training: the mean loss () and the MicroStep for `backward`."""
        losses, step = self.losses(tokens, targets)
        return losses.sum() / (step.targets != IGNORE_INDEX).sum(), step

    @torch.no_grad()
    def losses(
        self,
        tokens,  # (B, T)
        targets,  # (B, T)
    ):
        """Forward pass of training: the losses (N,) and the MicroStep for `backward`."""
        step = MicroStep(tokens.contiguous(), targets.reshape(-1), self.precision)
        stream = None
        for piece in self.pieces:
            stream, saved = piece.forward(step, stream)
            step.saved.append(saved)
        losses, saved = self.head.forward(step, stream)
        step.saved.append(saved)
        return losses, step

    @torch.no_grad()
    def _evaluate(
        self,
        tokens,  # (B, T)
        targets,  # (B, T)
    ):
        """The losses (N,), with plain products of the weights as they are."""
        step = MicroStep(tokens.contiguous(), targets.reshape(-1), EVALUATION)
        stream = None
        for piece in self.pieces:
            stream, _ = piece.forward(step, stream)
        return self.head.losses(step, stream)

    @torch.no_grad()
    def backward(
        self,
        step,
        grad_loss,  # ()
    ):
        """Backward pass: accumulate the gradient of grad_loss * loss into every parameter's .grad.

        Frees the tensors of `step` as it goes, so it runs once per step.
        """
        step.order = sort_rows(step.tokens, self.model.config.padded_vocab_size)
        grad = self.head.backward(step, step.saved.pop(), grad_loss)
        for piece in reversed(self.pieces):
            grad = piece.backward(step, step.saved.pop(), grad)
        self.ran = True
