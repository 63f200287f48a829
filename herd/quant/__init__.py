"""Weights in fewer bits: which matrices, and how a number becomes a code."""
