"""Norms folded into the linear layers beside them."""
