"""Decompositions of ΔW: the interface, and those that ship with this package, one file each."""
