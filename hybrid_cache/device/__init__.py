"""All that holds tensors: the memory of the cache, batches, the model's passes. It decides nothing."""
