"""The books of the cache: which pages and states are kept, for whom, and what is evicted. Integers only."""
