"""Formats of adapters on disk, one package each."""
