"""What bench.tune and bench.first_call run: the inputs of each op, and its candidates."""
