"""Which of the ways to compute a product is the fastest here: measured, chosen, kept, found again.

Nothing in this file calls a GPU: who can compute, and who can measure, is handed in.
"""

from dataclasses import dataclass
from functools import partial

GAIN = 0.99  # of the other library's time: a library is left only for more than noise
AGREEMENT = 0.02  # relative: fast accumulation of FP8 differs by 1e-3, rounding to bf16 by 4e-3


def agrees(
    got,  # (rows, cols)
    expected,  # (rows, cols)
):
    """Whether two ways to compute a product give the same, up to rounding."""
    got, expected = got.double(), expected.double()
    return bool((got - expected).norm() <= AGREEMENT * expected.norm())


@dataclass(frozen=True)
class Winner:
    """What was chosen for a product: a plan of the library, or None: the other library.

    `seconds` of the chosen way and of the other library; equal where that won.
    """

    plan: object
    seconds: float
    other_seconds: float

    def entry(self):
        """As the store keeps it."""
        text = None if self.plan is None else self.plan.text
        return {"algorithm": text, "seconds": self.seconds, "other_seconds": self.other_seconds}


class Winners:
    """The fastest way per product.

    Args:
        library: has `candidates(product)`, plans of which each has a `text`, and
            `restore(product, text)`, the plan or None (model/fp8/cublaslt.py).
        measure: measure(calls) gives the seconds of each.
        store: kernels.common.store.Store, whose section names GPU and versions.
    """

    def __init__(self, library, measure, store):
        self.library, self.measure, self.store = library, measure, store
        self._kept = None  # the store's entries, read once

    def recall(self, product):
        """The Winner of a product as an earlier process kept it; None where there is none that
        still holds."""
        if self._kept is None:
            self._kept = self.store.entries()
        entry = self._kept.get(str(product))
        if not isinstance(entry, dict) or "algorithm" not in entry:
            return None
        seconds = entry.get("seconds"), entry.get("other_seconds")
        if not all(isinstance(x, float) and x > 0 for x in seconds):
            return None
        if entry["algorithm"] is None:
            return Winner(None, *seconds)
        plan = self.library.restore(product, entry["algorithm"])
        return plan and Winner(plan, *seconds)

    def tune(self, product, run, other):
        """Measure the library's candidates and the other library in turns, and choose.

        A candidate whose last rows are not those of the other library is left out. The fastest of
        several may be so by luck: it meets the other library once more, and those times count.

        Args:
            run: run(plan) computes the product (rows, cols) by the library.
            other: other() computes it by the other library.
        """
        rows = slice(-64, None)
        expected = other()[rows].clone()
        plans = [x for x in self.library.candidates(product) if agrees(run(x)[rows], expected)]
        first, *seconds = self.measure([other, *(partial(run, plan) for plan in plans)])
        if min(seconds, default=first) < GAIN * first:
            plan = plans[seconds.index(min(seconds))]
            first, best = self.measure([other, partial(run, plan)])
            if best < GAIN * first:
                return Winner(plan, best, first)
        return Winner(None, first, first)

    def keep(self, winners):
        """Put {product: Winner} into the store; returns None, or why that failed."""
        return self.store.add({str(product): each.entry() for product, each in winners.items()})
