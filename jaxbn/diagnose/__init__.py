"""What is wrong with the statistics of a trained model, in words, with the remedy."""

from jaxbn.diagnose._diagnose import diagnose as diagnose
from jaxbn.diagnose._report import Finding as Finding
from jaxbn.diagnose._report import LayerReport as LayerReport
from jaxbn.diagnose._report import Report as Report
