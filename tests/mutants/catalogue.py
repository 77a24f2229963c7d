"""All mutants."""

from tests.mutants import kernels, parts, vectors

MUTANTS = [*kernels.MUTANTS, *vectors.MUTANTS, *parts.MUTANTS]
