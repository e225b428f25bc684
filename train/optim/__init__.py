"""Muon and AdamW: configuration, the eager optimiser and the one on the kernels."""
