"""Batches of packed rows on a device."""

import itertools

import torch

from nanofuse.train.data.loader import LoaderState, ProcessLoader, ThreadLoader

PINNED_SLOTS = 3


def restore_state(position, tensors):
    """The LoaderState of a checkpoint.

    Args:
        position: meta.json's; other names in it do not count.
        tensors: {name: tensor} of the loader's file.

    Raises:
        UserError: they do not fit together.
    """
    position = {name: position[name] for name in LoaderState().position()}
    arrays = {n: t.numpy() for n, t in tensors.items() if t.dtype in (torch.int32, torch.int64)}
    return LoaderState.restore(position, arrays)


class DeviceLoader:
    """Endless iterator of (inputs, targets), (B, T) int64 each, on a device.

    `state` is the LoaderState after the batches handed out so far, `tokens` the inputs of the
    latest one on the CPU, (B, T) int32, good until the next one. On a GPU batches are made in a
    process of their own, and copied from pinned memory on a side stream one batch ahead; a pinned
    buffer is written again only after its copy has finished. On a CPU, where nothing is launched, a
    thread makes them.

    Args:
        packing: train.data.loader.Packing.
        device: torch device or its name.
        state: LoaderState to continue from.
        thread: make them in a thread on a GPU, too, where a process would take longer to start.

    Raises:
        UserError: from the iterator, see train.data.loader.packed_batches.
    """

    def __init__(self, packing, device, state=None, thread=False):
        self.device, self.packing = torch.device(device), packing
        self.state = state or LoaderState()
        self.cuda = self.device.type == "cuda"
        kind = ProcessLoader if self.cuda and not thread else ThreadLoader
        self.loader = kind(packing, state)
        self.shape = packing.batch_size, packing.seq_len + 1
        if self.cuda:
            self.stream = torch.cuda.Stream(self.device)
            self.slots = itertools.cycle(
                [
                    (torch.empty(self.shape, dtype=torch.int32, pin_memory=True), event)
                    for event in (torch.cuda.Event() for _ in range(PINNED_SLOTS))
                ]
            )
            self.staged = None
        self.tokens = None

    def _stage(self):
        """Start copying the next batch; returns (rows on the device, pinned ones, event, state)."""
        pinned, copied = next(self.slots)
        copied.synchronize()
        state = self.loader.take(pinned.numpy())
        with torch.cuda.stream(self.stream):
            rows = pinned.to(self.device, non_blocking=True).long()  # (B, T+1)
            copied.record()
        return rows, pinned, copied, state

    def __iter__(self):
        return self

    def __next__(self):
        if not self.cuda:
            on_host = torch.empty(self.shape, dtype=torch.int32)
            self.state = self.loader.take(on_host.numpy())
            rows = on_host.long()  # (B, T+1)
        else:
            rows, on_host, copied, self.state = self.staged or self._stage()
            current = torch.cuda.current_stream(self.device)
            current.wait_event(copied)
            rows.record_stream(current)
            self.staged = self._stage()
        self.tokens = on_host[:, :-1]
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def close(self):
        """Stop what works in the background."""
        self.loader.close()
