"""Requests in, tokens out: what runs in the next step."""
