"""The normalizers: the protocol, the checks, the one rule, `BatchNorm` and what wraps it."""
