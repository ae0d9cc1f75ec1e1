"""How visual tokens are removed, once, for every model: hooks, full frame, KV cache, attention taps, trace."""
