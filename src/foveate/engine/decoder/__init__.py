"""One pass of the language model: frame, masks, KV cache, attention taps."""
