"""Without a GPU the kernels run under Triton's interpreter, which must be on before an import."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
