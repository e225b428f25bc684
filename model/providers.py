"""Names of what may be chosen, to be read without loading torch or a library.

nanofuse.model.backends.choice and nanofuse.model.fp8.products hold what the names stand for.
"""

ATTENTION = ("fa3", "fa4", "te", "flex", "sdpa")  # in the order in which "auto" tries them on a GPU
PRODUCTS = ("te", "torch", "off")  # of FP8 operands; off: bf16 or fp32
