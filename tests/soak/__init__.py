"""Trains for an hour while processes are killed, and compares with a twin in float64."""
