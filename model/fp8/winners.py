"""Which of the ways to compute a product is the fastest here: measured, chosen, kept, found again.

Nothing in this file calls a GPU: who can compute, and who can measure, is handed in.
"""

from dataclasses import dataclass
from functools import partial

import torch

GAIN = 0.99  # of the default's time: it is left only for more than noise
GLANCE = 3  # rounds in which all are measured, for the fastest to meet
FINALISTS = 3
AGREEMENT = 0.02  # relative: fast accumulation of FP8 differs by 1e-3, rounding to bf16 by 4e-3
AGREEMENT_FP32 = 1e-3  # of sums in fp32


def agrees(
    got,  # (rows, cols)
    expected,  # (rows, cols)
):
    """Whether two ways to compute a product give the same, up to rounding."""
    bound = AGREEMENT_FP32 if got.dtype == torch.float32 else AGREEMENT
    got, expected = got.double(), expected.double()
    return bool((got - expected).norm() <= bound * expected.norm())


@dataclass(frozen=True)
class Winner:
    """What was chosen for a product: a plan of the library, or None: the other library.

    `seconds` of the chosen way and of the default; equal where that won.
    """

    plan: object
    seconds: float
    default_seconds: float

    def entry(self):
        """As the store keeps it."""
        text = None if self.plan is None else self.plan.text
        seconds = {"seconds": self.seconds, "default_seconds": self.default_seconds}
        return {"algorithm": text, **seconds}


class Winners:
    """The fastest way per product.

    Args:
        library: has `first(product)`, the plan that it takes unless told, `candidates(product)`,
            plans of which each has a `text`, and `restore(product, text)`, the plan or None
            (model/fp8/cublaslt.py).
        measure: measure(calls, rounds=…) gives the seconds of each.
        store: kernels.common.store.Store, whose section names GPU and versions.
    """

    def __init__(self, library, measure, store):
        self.library, self.measure, self.store = library, measure, store
        self._kept = None  # the store's entries, read once

    def _entries(self):
        if self._kept is None:
            self._kept = self.store.entries()
        return self._kept

    def recall(self, product):
        """The Winner of a product as an earlier process kept it; None where there is none that
        still holds."""
        entry = self._entries().get(str(product))
        if not isinstance(entry, dict) or "algorithm" not in entry:
            return None
        seconds = entry.get("seconds"), entry.get("default_seconds")
        if not all(isinstance(x, float) and x > 0 for x in seconds):
            return None
        if entry["algorithm"] is None:
            return Winner(None, *seconds)
        plan = self.library.restore(product, entry["algorithm"])
        return plan and Winner(plan, *seconds)

    def told(self, winners):
        """{product: Winner} in plain data, for `learn`."""
        entries = {str(product): each.entry() for product, each in winners.items()}
        return {"section": self.store.section, "entries": entries}

    def learn(self, told):
        """Recall what another process told from now on, if it has the same GPU and versions."""
        if told["section"] == self.store.section:
            self._kept = {**self._entries(), **told["entries"]}

    def tune(self, product, run, other, result=lambda call: call()):
        """Measure the library's plans and the other library in turns, and choose.

        The default is the faster of the other library and of the plan that the library takes unless
        told; it is left only for what is faster. A plan whose last rows are not those of the other
        library is left out. All are measured shortly, the fastest and the default for longer. The
        fastest of several may be so by luck: it meets the default once more, and those times count.

        Args:
            run: run(plan) computes the product (rows, cols) by the library.
            other: other() computes it by the other library.
            result: result(call) is what such a call computes.
        """
        rows = slice(-64, None)
        expected = result(other)[rows].clone()
        plans = {plan.text: plan for plan in (self.library.first(product),)}
        plans |= {plan.text: plan for plan in self.library.candidates(product)}
        ways = {text: partial(run, plan) for text, plan in plans.items()}
        ways = {text: way for text, way in ways.items() if agrees(result(way)[rows], expected)}
        defaults = [None, *list(plans)[:1]]
        ways[None] = other
        glance = self._seconds(ways, ways, rounds=GLANCE)
        default = min((text for text in defaults if text in ways), key=glance.get)
        finalists = [text for text in sorted(glance, key=glance.get) if text != default]
        seconds = self._seconds(ways, [default, *finalists[:FINALISTS]])
        best = min(seconds, key=seconds.get)
        if seconds[best] < GAIN * seconds[default]:
            seconds = self._seconds(ways, [default, best])
            if seconds[best] < GAIN * seconds[default]:
                return Winner(plans.get(best), seconds[best], seconds[default])
        return Winner(plans.get(default), seconds[default], seconds[default])

    def _seconds(self, ways, names, **options):
        """{name: seconds} of some of {name: call}."""
        names = list(names)
        taken = self.measure([ways[name] for name in names], **options)
        return dict(zip(names, taken, strict=True))

    def keep(self, winners):
        """Put {product: Winner} into the store; returns None, or why that failed."""
        told = self.told(winners)
        self.learn(told)
        return self.store.add(told["entries"])
