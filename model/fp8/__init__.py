"""Matrix products: FP8 scales and weights, providers, and the linear layer of the baseline."""
