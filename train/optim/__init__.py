"""Muon and AdamW: configuration, the optimiser, and how its updates are computed."""
