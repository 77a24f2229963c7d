"""Says what is wrong with the statistics of a trained model, and what to do about it."""

from jaxbn.diagnose._diagnose import diagnose
from jaxbn.diagnose._layer_report import LayerReport
from jaxbn.diagnose._report import Finding, Report

__all__ = [
    "Finding",
    "LayerReport",
    "Report",
    "diagnose",
]

# Pickles and tracebacks then name the public module, whichever file defines a class.
for _name in __all__:
    globals()[_name].__module__ = __name__
