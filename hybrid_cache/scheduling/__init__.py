"""Whose turn it is, and what is kept for those who come back. Integers and floats only."""
