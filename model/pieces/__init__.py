"""The pieces of the GPT: each file has a piece's module and its fused forward and backward pass."""
