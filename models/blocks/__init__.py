"""The parts that models are made of. Each takes packed rows x [R, hidden] and gives [R, hidden] back.

A part holds packed weights; its `shape` says what it costs and what it keeps in the cache.
"""
