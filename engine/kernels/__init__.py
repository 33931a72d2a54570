"""Paged attention and its neighbours."""
