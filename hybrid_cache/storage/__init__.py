"""Bytes of the disk tier: files, and the threads that read and write them. Decides nothing; see `cache.disk`."""
