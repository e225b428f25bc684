"""Attention backends behind one call, and the choice between them."""
