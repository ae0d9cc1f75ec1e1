"""Mathematics: pure functions of tensors. No model, no hook, no state."""
