"""The GPT: configuration, definition, linears, attention backends and the generation engine."""
