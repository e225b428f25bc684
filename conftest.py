"""Without a GPU the kernels run under Triton's interpreter, which must be on before an import."""

import os

# The interpreter's products are NumPy's, of small tiles: a second thread costs more than it brings,
# many times more where another process wants the core. To be set before NumPy is loaded.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
