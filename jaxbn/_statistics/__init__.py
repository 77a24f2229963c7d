"""Vectors of statistics: weights, moments, sums over devices, running averages."""
