"""Text to batches: corpus, download, tokenizer, packing, loader."""
