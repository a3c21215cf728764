"""Shards verified and described."""
