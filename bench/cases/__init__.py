"""Cases of bench.tune and bench.first_call: every op's inputs and candidate configurations."""
