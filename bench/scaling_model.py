"""The cost of a step on many GPUs: bytes exactly, milliseconds as predicted; docs/scaling.md.

    python -m bench.scaling_model

Writes the tables of docs/scaling.md; a test (tests/bench/test_scaling_model.py) makes them anew.
The bytes are those of bench/traffic.py, which a test holds against what is sent.

    T(W) = (T(1) - U) / W * 1.003 + U_W + E + 0.3 ms

T(1) is a step of one GPU: the floor of bench/roofline.py, times what it was measured to take of it.
U is the optimiser's part of it; U_W that of the rank with most to update, by its shares of Muon's
FLOPs and of the rows. 0.3 % is for steps that differ between GPUs, 0.3 ms for the small
collectives. E is the communication that is exposed:

    today     what is left of transfers, of 0.03 ms + bytes / rate each, of packed rows, our sums of
              W parts and operands that are transposed, where all travels beside the updates
    nanochat  the same for padded stacks, which are copied, and without our sums
    DDP       twice the gradients' bytes and no values; U_W = U

Bytes are what a rank sends or receives, whichever is more. Of tables a rank sends the rows that its
tokens look up, as many as were counted for so many tokens of text. Rates are those of one GPU. Of H
hosts of 8 GPUs, one on its own sends (W - 8) / (W - 1) of its bytes between hosts; in two levels a
host adds its 8 parts first, and each GPU exchanges an eighth with its like on the other hosts.
"""

import math
import re
import sys
from collections import Counter, deque
from functools import cache
from pathlib import Path

from nanofuse.bench.roofline import COPY_RATE, floor_ms
from nanofuse.bench.traffic import (
    buckets,
    busiest,
    gradient_bytes,
    kinds,
    number_bytes,
    operand_bytes,
    value_bytes,
)
from nanofuse.model.config import GPTConfig
from nanofuse.train.command import CommandParser, run_command
from nanofuse.train.errors import UserError
from nanofuse.train.optim.muon_adamw import AHEAD_BYTES
from nanofuse.train.placement import muon_cost
from nanofuse.train.plan import REFERENCE_DEPTH
from nanofuse.train.schedules import auto_batch_size

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
LATENCY_MS = 0.03  # of a transfer
HOST_RATE, BETWEEN_RATE = 320e9, 45e9  # bytes/s of a GPU: in a host, and between hosts
HOST_GPUS = 8
JITTER, FIXED_MS = 1.003, 0.3
ROWS = 32  # of a micro-step
RECORD = "records/2026-11-30-two-gpus"
MEASURED = {4: 75.8, 8: 224.4, 16: 981.4, 24: 2742.4}  # its ms of 524,288 tokens, FP8, by depth
OPTIMIZER_MS = 10.9  # of a step of d16 (records/2026-11-28-house), from which Muon's rate follows
ADAMW_PASSES = 8  # of a table's bytes: value, gradient and moments read, and written or cleared
ROWS_RECORD = "records/2026-11-29-rows"
FIRST_POWER = 9
LOOKED_UP = {  # its distinct rows of 2^9, 2^10, … tokens, by look-up
    "token": (229, 392, 684, 1205, 2126, 3626, 5911, 9214, 13667, 18990, 24346, 28552, 30960),
    "bigram": (392, 736, 1400, 2669, 5163, 9871, 18161, 32288, 54622,
               85350, 119680, 147162, 160382),
}  # fmt: skip
OWNERS_DIFFER = 1.02  # the rows of the owner with most, in times of the mean (ROWS_RECORD)
MIN_TOKENS = 2**19
DEPTHS = (4, 8, 12, 16, 20, 24, 32, 40)
WORLDS = (2, 4, 8)
HOSTS = (64, 1024)


def batch_tokens(depth):
    """Tokens of a step: train.run's choice, 524,288 at least."""
    counts = [GPTConfig.from_depth(d).num_scaling_params for d in (depth, REFERENCE_DEPTH)]
    return max(MIN_TOKENS, auto_batch_size(*map(float, counts)))


@cache
def alone_ms(depth):
    """A step of one GPU, FP8: as measured, or the floor times the measured excess over it, which is
    interpolated, and beyond the deepest as there."""
    config = GPTConfig.from_depth(depth)
    micro_steps = batch_tokens(depth) / (ROWS * config.sequence_len)
    known = sorted(MEASURED)
    excess = {d: MEASURED[d] / (8 * floor_ms(GPTConfig.from_depth(d), ROWS)) for d in known}
    high = next((d for d in known if d >= depth), known[-1])
    low = max((d for d in known if d <= depth), default=known[0])
    share = (depth - low) / (high - low) if high > low else 0.0
    factor = excess[low] + share * (excess[high] - excess[low])
    return micro_steps * floor_ms(config, ROWS) * factor


def rows_looked_up(lookup, tokens):
    """Distinct rows that so many tokens look up, between the counted numbers."""
    counted = LOOKED_UP[lookup]
    place = min(max(math.log2(tokens) - FIRST_POWER, 0), len(counted) - 1)
    low = min(int(place), len(counted) - 2)
    share = place - low
    return counted[low] ** (1 - share) * counted[low + 1] ** share


@cache
def seen(depth, world, ranks=1):
    """`seen` of bench.traffic, of every rank's tokens of a step, or of the tokens of as many ranks
    together."""
    config = GPTConfig.from_depth(depth)
    tokens = ranks * batch_tokens(depth) / world
    found = []
    for lookup in ("token", *config.table_rows):
        rows = math.ceil(OWNERS_DIFFER * rows_looked_up(lookup, tokens) / world)
        found.append((lookup, (rows,) * world))
    return tuple(found)


def _muon_flops(config):
    """Of an iteration, of all matrices."""
    return sum(b.flops[0] for b in buckets(config, 1))


def _adamw_ms(nbytes):
    return 1e3 * ADAMW_PASSES * nbytes / COPY_RATE


def _tables(config):
    return sum(kind.nbytes for kind in kinds(config) if kind.table)


def _muon_ms(flops):
    reference = GPTConfig.from_depth(16)
    known = OPTIMIZER_MS - _adamw_ms(_tables(reference))
    return flops / _muon_flops(reference) * known


def update_ms(bucket):
    """The update of a bucket by the rank with most to do."""
    tables = 0 if any(bucket.flops) else max(bucket.owned)
    return _adamw_ms(tables) + _muon_ms(max(bucket.flops))


def optimizer_ms(config, world=1):
    """An update by owners, one bucket after the other."""
    return sum(map(update_ms, buckets(config, world)))


def chunks(config, world):
    """nanochat's stacks: [(shape of a matrix, how many each rank has of the padded stack)]."""
    counts = Counter()
    for kind in kinds(config):
        if not kind.table:
            for shape in kind.shapes:
                counts[shape] += kind.units
    return [(shape, -(-count // world)) for shape, count in counts.items()]


def sums_ms(bucket):
    """Our own sums of the parts of W ranks, at the copy bandwidth: two are read and added in one
    pass, of which rows are first picked and then put back. More go through an fp32 sum, into which
    bf16 is copied first, and out of it."""
    world = len(bucket.owned)
    share = sum(bucket.moved) / sum(bucket.owned)  # of the elements

    def moved(width):  # bytes of an element
        widened = width + 4 if width < 4 else 0
        if share < 1:
            many = 4 + (width + 8) + share * (world - 1) * (width + 16) + 4 + width
            return share * 7 * width if world == 2 else many
        many = widened + (world - 1) * (width + 8) + 4 + width
        return 3 * width if world == 2 else many

    parts = sum(count / world * moved(width) for width, count in bucket.elements.items())
    return 1e3 * parts / COPY_RATE


def packing_ms(bucket):
    """A rank's copies of rows of tables: of the gradients that it sends; of the values that it
    sends; of those that come."""
    if not bucket.packed:
        return 0.0, 0.0, 0.0
    mine = 1 / len(bucket.owned)
    sent = (1 - mine) * sum(bucket.moved), mine * sum(bucket.returned)
    return [1e3 * 2 * x / COPY_RATE for x in (*sent, (1 - mine) * sum(bucket.returned))]


def pipeline_ms(found, operands, numbers):
    """Buckets one after the other, as MuonAdamW.step takes them: gradients travel ahead of the
    updates, values behind them, and behind the last matrices the operands, FP8. The links carry one
    transfer at a time. Rows of tables are packed before they travel. At the end operands are
    transposed, and values are put in their places.

    Args:
        found: Buckets of bench.traffic.
        operands: bytes that each rank makes of them, by rank.
        numbers: bytes of the numbers of rows, which travel first.

    Returns:
        ms from the end of the backward pass until everything is there.
    """
    world, waiting, arriving = len(operands), deque(found), deque()
    computed = carried = transfer_ms(busiest(numbers), world) if any(numbers) else 0.0
    returned, made = [], carried  # when values are there, and how long they take to be put in place
    last = [bucket for bucket in found if bucket.matrices][-1]
    for bucket in found:
        ahead = sum(size for size, _ in arriving)
        while waiting and (len(arriving) < 2 or ahead + sum(waiting[0].owned) <= AHEAD_BYTES):
            following = waiting.popleft()
            size = sum(following.owned)
            ahead, computed = ahead + size, computed + packing_ms(following)[0]
            carried = max(carried, computed) + transfer_ms(busiest(following.moved), world)
            arriving.append((size, carried))
        _, arrived = arriving.popleft()
        _, packed, placed = packing_ms(bucket)
        computed = max(computed, arrived) + sums_ms(bucket) + update_ms(bucket) + packed
        if any(bucket.returned):
            carried = max(carried, computed) + transfer_ms(busiest(bucket.returned), world)
            returned.append((carried, placed))
        if bucket is last:
            carried = made = max(carried, computed) + transfer_ms(busiest(operands), world)
    computed = max(computed, made) + 1e3 * 2 * (sum(operands) - min(operands)) / COPY_RATE
    for arrived, placed in returned:
        computed = max(computed, arrived) + placed
    return computed


def transfer_ms(nbytes, world):
    """Of bytes that the busiest rank sends or receives."""
    if world <= HOST_GPUS:
        return LATENCY_MS + 1e3 * nbytes / HOST_RATE
    away = (world - HOST_GPUS) / (world - 1)
    return LATENCY_MS + 1e3 * max((1 - away) * nbytes / HOST_RATE, away * nbytes / BETWEEN_RATE)


def two_levels_ms(inside, between, world):
    """Of all bytes that a rank has for the others of its host, and a host for the other ones."""
    hosts = world / HOST_GPUS
    seconds = (HOST_GPUS - 1) / HOST_GPUS * inside / HOST_RATE
    seconds += (hosts - 1) / hosts * between / HOST_GPUS / BETWEEN_RATE
    return 2 * LATENCY_MS + 1e3 * seconds


def levels_ms(depth, world):
    """Of gradients, of rows that a rank's tokens look up and that those of its host do; and of
    values."""
    config = GPTConfig.from_depth(depth)
    looked_up = (seen(depth, world, ranks) for ranks in (1, HOST_GPUS))
    grads = [sum(gradient_bytes(config, world, rows)) for rows in looked_up]
    values = sum(map(_returned, kinds(config)))
    return two_levels_ms(*grads, world), two_levels_ms(values, values, world)


def nanochat_ms(config, world):
    """As pipeline_ms, of nanochat's order: all reductions are started at once, tables first.

    Returns:
        ms to the end, and those of its updates.
    """
    padded = chunks(config, world)
    stacks = [4 * world * count * rows * columns for (rows, columns), count in padded]
    share = (world - 1) / world
    links = [transfer_ms(share * x, world) for x in (_tables(config), *stacks)]
    updates = [_adamw_ms(_tables(config) / world)]
    updates += [_muon_ms(count * muon_cost(*shape)) for shape, count in padded]
    copied = 1e3 * sum(stacks) / COPY_RATE  # once zeroed, then written and read, there and back
    computed, carried = 3 * copied, sum(links)
    for index, (link, update) in enumerate(zip(links, updates, strict=True)):
        computed = max(computed, sum(links[: index + 1])) + update
        carried = max(carried, computed) + link
    return max(computed, carried) + 2 * copied, sum(updates)


def _returned(kind):
    """Bytes of a kind's values in the form that the forward pass uses."""
    return kind.elements if kind.operand else kind.nbytes


def exposed_ms(depth, world, scheme):
    """Communication of a step that nothing hides."""
    config = GPTConfig.from_depth(depth)
    whole, share = sum(kind.nbytes for kind in kinds(config)), (world - 1) / world
    if scheme == "today":
        rows = seen(depth, world)
        moved = buckets(config, world, seen=rows), operand_bytes(config, world)
        end = pipeline_ms(*moved, number_bytes(config, world, rows))
        return end - optimizer_ms(config, world)
    if scheme == "DDP":
        return transfer_ms(2 * share * whole, world)
    end, updates = nanochat_ms(config, world)
    return end - updates


def step_ms(depth, world, scheme="today"):
    """A predicted step."""
    config, alone = GPTConfig.from_depth(depth), alone_ms(depth)
    if world == 1:
        return alone
    update = own = optimizer_ms(config)
    if scheme == "nanochat":
        _, own = nanochat_ms(config, world)
    elif scheme != "DDP":
        own = optimizer_ms(config, world)
    own_part = (alone - update) / world * JITTER + own
    return own_part + exposed_ms(depth, world, scheme) + FIXED_MS


def _row(cells):
    return f"| {' | '.join(cells)} |\n"


def _head(*names):
    return _row(names) + "| --- |" + " ---: |" * (len(names) - 1) + "\n"


def bytes_table():
    """MB by kind and depth."""
    text = _head(
        "depth", "matrices", "lm_head", "wte", "values", "bigram", "sum", "sum in FP8", "state, GB"
    )
    for depth in DEPTHS:
        config = GPTConfig.from_depth(depth)
        sizes = {}
        for kind in kinds(config):
            name = kind.name if kind.table else "matrices"
            sizes[name] = sizes.get(name, 0) + kind.nbytes
        small = sum(map(_returned, kinds(config)))
        moments = sum(kind.nbytes * (2 if kind.table else 1) for kind in kinds(config))
        cells = [*sizes.values(), sum(sizes.values()), small]
        state = f"{(2 * sum(sizes.values()) + moments) / 1e9:.1f}"
        text += _row([f"d{depth}", *(f"{x / 1e6:,.0f}" for x in cells), state])
    return text


def _step(depth, world, scheme, alone):
    ms = step_ms(depth, world, scheme)
    return f"{ms:,.1f} ({alone / ms:.2f})"


def host_table():
    """Steps on the GPUs of one host."""
    text = _head(
        *("depth", "GPUs", "sent, MB", "if all rows", "exposed today"),
        *("today", "nanochat's", "DDP"),
    )
    for depth in DEPTHS:
        config, alone = GPTConfig.from_depth(depth), alone_ms(depth)
        text += _row([f"d{depth}", "1", "", "", "", f"{alone:,.1f}", "", ""])
        for world in WORLDS:
            cells = [f"d{depth}", str(world)]
            for rows in (seen(depth, world), ()):
                moved = gradient_bytes(config, world, rows), value_bytes(config, world)
                cells.append(f"{sum(map(busiest, moved)) / 1e6:,.0f}")
            cells.append(f"{exposed_ms(depth, world, 'today'):.1f}")
            schemes = "today", "nanochat", "DDP"
            text += _row(cells + [_step(depth, world, scheme, alone) for scheme in schemes])
    return text


def hosts_table():
    """Steps on many hosts."""
    text = _head(
        "depth", "tokens", "GPUs", "rows a GPU", "own part", "moved today", "in two levels"
    )
    for depth in DEPTHS[3:]:
        config, tokens = GPTConfig.from_depth(depth), batch_tokens(depth)
        for world in HOSTS:
            rows = tokens / config.sequence_len / world
            own = f"{alone_ms(depth) / world:,.1f}" if rows >= 1 else "–"
            moved = gradient_bytes(config, world, seen(depth, world)), value_bytes(config, world)
            flat = sum(transfer_ms(busiest(x), world) for x in moved)
            levels = sum(levels_ms(depth, world))
            cells = f"2^{tokens.bit_length() - 1}", str(world), f"{rows:g}", own
            text += _row([f"d{depth}", *cells, f"{flat:,.0f}", f"{levels:,.0f}"])
    return text


TABLES = {"bytes": bytes_table, "host": host_table, "hosts": hosts_table}


def page(text):
    """docs/scaling.md with its tables made anew.

    Raises:
        UserError: a table's place is not there.
    """
    for name, table in TABLES.items():
        mark, end = f"<!-- table: {name} -->\n", "<!-- end -->"
        before = re.compile(re.escape(mark) + ".*?" + re.escape(end), re.DOTALL)
        if not before.search(text):
            raise UserError(
                f"docs/scaling.md has no place for the table {name!r}: write {mark}{end}"
            )
        whole = f"{mark}\n{table()}\n{end}"
        text = before.sub(lambda _, whole=whole: whole, text)
    return text


def main(argv=None):
    parser = CommandParser(
        prog="python -m bench.scaling_model", description=(__doc__ or "").partition("\n")[0]
    )
    parser.parse_args(argv)
    if not PAGE.is_file():
        raise UserError(f"{PAGE} is not there; bench.scaling_model runs in a clone")
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"written to {PAGE}", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
