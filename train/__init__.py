"""Training: the command, data, tokenizer, optimiser, schedules, checkpoints and evaluation."""
