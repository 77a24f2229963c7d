"""What is wrong with the statistics of a trained model, in words, with the remedy."""

from jaxbn.diagnose._diagnose import diagnose
from jaxbn.diagnose._report import Finding, LayerReport, Report

__all__ = [
    "Finding",
    "LayerReport",
    "Report",
    "diagnose",
]

# Pickles and tracebacks name the public module, and so survive a move of the file.
for _name in __all__:
    globals()[_name].__module__ = __name__
