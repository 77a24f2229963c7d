"""The normalizers: their protocol, the one rule, `BatchNorm` and what wraps it."""
