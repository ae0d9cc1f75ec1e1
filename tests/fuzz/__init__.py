"""Mixed requests made by hypothesis, each held against the same request alone: `make fuzz`."""
