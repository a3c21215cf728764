"""Indexes of images on disk, and queries against them."""
