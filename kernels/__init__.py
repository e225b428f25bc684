"""Ops of the GPT and its optimiser, one file each; nothing here imports model/ or train/."""
