class SparseVLM: ...  # temporary, until the method lands
