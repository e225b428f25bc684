"""What several ranks send each other in a step, byte by byte, from a model's shape alone: what
train/optim/parts.py, train/optim/sharing.py and model/fp8/weights.py make of it, and from the rows
of tables that its tokens look up. docs/scaling.md is made of this.

These are given as `seen`: ((name of the look-up, (rows of each owner, that every rank looks up in a
step)), ...), names as Kind.lookup; where there are none, all rows travel.
"""

from dataclasses import dataclass
from functools import cache

from nanofuse.train.optim.parts import BUCKET_BYTES
from nanofuse.train.placement import (
    INDEX_BYTES,
    go_as_rows,
    is_small,
    matrix_owners,
    muon_cost,
    row_blocks,
    row_slices,
)


@dataclass(frozen=True)
class Kind:
    """Tensors of one kind: `units` of `shapes`, each in `width` bytes an element, values and
    gradients; a matrix has one owner, a table's rows as many as there are ranks. What returns of an
    `operand` is not its value. `lookup` names how tokens find the rows of an embedding table."""

    name: str
    units: int
    shapes: tuple
    width: int
    dtype: str
    table: bool = True
    operand: bool = False
    lookup: str = ""

    def owned_rows(self, world):
        """How many of a table's rows each rank owns."""
        ((rows, _),) = self.shapes
        if not self.lookup:
            return [part.stop - part.start for part in row_blocks(rows, world)]
        return [len(range(rows)[part]) for part in row_slices(world)]

    @property
    def elements(self):
        return self.units * sum(rows * columns for rows, columns in self.shapes)

    @property
    def nbytes(self):
        return self.width * self.elements


def kinds(config, fused=True):
    """The Kinds of all that has an owner, the matrices in the order of model.fp8.weights.Weights.

    Args:
        fused: whether products take operands, and tables are bf16, as on a GPU; else all is fp32.
    """
    c, kv, vocab = config.n_embd, config.kv_dim, config.padded_vocab_size
    fp32, low = (4, "float32"), (2, "bfloat16") if fused else (4, "float32")
    matrix, head = {"table": False, "operand": fused}, {"operand": fused}
    layers, values = config.n_layer, len(config.value_embed_layers)
    found = [
        Kind("qkv", layers, ((c, c), (kv, c), (kv, c)), *fp32, **matrix),
        Kind("attn_proj", layers, ((c, c),), *fp32, **matrix),
        Kind("fc", layers, ((4 * c, c),), *fp32, **matrix),
        Kind("mlp_proj", layers, ((c, 4 * c),), *fp32, **matrix),
        Kind("lm_head", 1, ((vocab, c),), *fp32, **head),
        Kind("wte", 1, ((vocab, c),), *low, lookup="token"),
        Kind("values", values, ((vocab, kv),), *low, lookup="token"),
    ]
    tables = config.table_rows.items()
    found += [Kind(name, 1, ((rows, c),), *low, lookup=name) for name, rows in tables]
    return [kind for kind in found if not all(map(is_small, kind.shapes))]


@dataclass
class Bucket:
    """What moves together (train/optim/parts.py), by rank: bytes of the gradients that it owns, of
    those that every other rank sends to it, and of the values that it returns, and FLOPs of an
    iteration of Muon; and elements by bytes of one. `packed` are those of rows of tables,
    `matrices` those with factors of products."""

    owned: list
    moved: list
    returned: list
    flops: list
    elements: dict
    packed: bool = False
    matrices: bool = False

    @classmethod
    def empty(cls, world):
        return cls([0] * world, [0] * world, [0] * world, [0.0] * world, {})

    def sent(self, rank):
        """Bytes that a rank sends of gradients, and of values."""
        others = len(self.owned) - 1
        return sum(self.moved) - self.moved[rank], self.returned[rank] * others

    def count(self, kind, owner, rows, columns, moved=None):
        size = rows * columns
        self.owned[owner] += size * kind.width
        self.moved[owner] += (rows if moved is None else moved) * columns * kind.width
        self.packed |= bool(kind.lookup)
        self.matrices |= not kind.lookup
        self.returned[owner] += size * kind.width * (not kind.operand)
        self.elements[kind.width] = self.elements.get(kind.width, 0) + size
        if not kind.table:
            self.flops[owner] += muon_cost(rows, columns)


def rows_by_number(config, world, seen, fused=True):
    """{look-up: for each owner the rows that travel to it by their numbers, None where all go}."""
    found = {}
    for lookup, counts in seen:
        alike = [kind for kind in kinds(config, fused) if kind.lookup == lookup]
        row_bytes = sum(kind.units * kind.width * kind.shapes[0][1] for kind in alike)
        pairs = zip(counts, alike[0].owned_rows(world), strict=True)
        found[lookup] = [n if go_as_rows(n, rows, row_bytes) else None for n, rows in pairs]
    return found


def number_bytes(config, world, seen, fused=True):
    """Bytes of the rows' numbers that every other rank sends to each owner."""
    counts = rows_by_number(config, world, seen, fused).values()
    return [INDEX_BYTES * sum(each[owner] or 0 for each in counts) for owner in range(world)]


@cache
def buckets(config, world, fused=True, seen=()):
    """The Buckets of a step, but for what is everybody's: stacks of a shape, then lm_head and the
    tables, the largest first."""
    matrices = [kind for kind in kinds(config, fused) if not kind.table]
    dealt = matrix_owners([(kind.units, kind.shapes) for kind in matrices], world)
    stacks, room = {}, 0
    for kind, owners in zip(matrices, dealt, strict=True):
        alike = len(set(kind.shapes)) == 1
        for index, shape in enumerate(kind.shapes):
            # q, k and v of grouped heads have a stack each
            bucket = stacks.setdefault(shape if alike else (index,), Bucket.empty(world))
            for owner in owners:
                bucket.count(kind, owner, *shape)
    found = list(stacks.values())
    by_number = rows_by_number(config, world, seen, fused)
    tables = [kind for kind in kinds(config, fused) if kind.table]
    tables.sort(key=lambda kind: (bool(kind.lookup), -kind.nbytes // kind.units))
    for kind in tables:
        for _ in range(kind.units):
            ((rows, columns),) = kind.shapes
            moved = by_number.get(kind.lookup, [None] * world)
            nbytes = rows * columns * kind.width
            if room < nbytes:
                found.append(Bucket.empty(world))
                room = BUCKET_BYTES
            room -= nbytes
            for owner, count in enumerate(kind.owned_rows(world)):
                found[-1].count(kind, owner, count, columns, moved[owner])
    return found


def gradient_bytes(config, world, seen=()):
    """Bytes of gradients, and of rows' numbers, that every other rank sends to each owner."""
    parts = [bucket.moved for bucket in buckets(config, world, seen=seen)]
    return [sum(own) for own in zip(*parts, number_bytes(config, world, seen), strict=True)]


@cache
def operand_bytes(config, world, width=1):
    """Bytes of the operands that each rank makes for all, by rank.

    Args:
        width: bytes of an element: FP8, or 2 for bf16.
    """
    found = [0] * world
    kept = [kind for kind in kinds(config) if kind.operand]
    matrices = [kind for kind in kept if not kind.table]
    dealt = matrix_owners([(kind.units, kind.shapes) for kind in matrices], world)
    for kind, owners in zip(matrices, dealt, strict=True):
        for owner in owners:
            found[owner] += width * kind.elements // kind.units
    for kind in (kind for kind in kept if kind.table):
        for owner, rows in enumerate(kind.owned_rows(world)):
            found[owner] += width * rows * kind.shapes[0][1]
    return found


def value_bytes(config, world):
    """Bytes that each rank returns to each other one, by rank, with FP8 operands."""
    returned = [b.returned for b in buckets(config, world)]
    return [sum(own) for own in zip(*returned, operand_bytes(config, world), strict=True)]


def busiest(owned):
    """Bytes of gradients that the rank sends or receives that moves most of them; of values, if
    these are what each rank returns.

    Args:
        owned: bytes that every other rank sends to an owner, or has of it, by owner.
    """
    whole, others = sum(owned), len(owned) - 1
    return max(max(whole - own, own * others) for own in owned)
