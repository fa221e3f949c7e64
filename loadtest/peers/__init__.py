"""Comparisons: the same work done by a peer, in one run, turn by turn."""
