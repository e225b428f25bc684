"""What `python -m train.sweep` is made of, and the sweeps that come with it (*.toml)."""
