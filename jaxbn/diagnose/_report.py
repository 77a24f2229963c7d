"""The result of a diagnosis: findings and a table of the layers, and how they print."""

import dataclasses
import math
from collections.abc import Mapping
from os import PathLike
from typing import Any, Literal

from jaxbn.diagnose._layer_report import NUMBERS, LayerReport
from jaxbn.diagnose._picture import draw


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that is wrong, with its remedy.

    Example:
        >>> from jaxbn.diagnose import Finding
        >>> print(Finding("bn", "dead", "warning", {"channels": 2}, "2 are.", "Prune."))
        bn: dead (warning): 2 are. Prune.

    Attributes:
        layer: The path of the layer among the variables; "" for the model as a whole.
        cause: A short word that never changes, of those that `diagnose` lists.
        severity: "error" where evaluation is wrong or soon will be; "question" where
            something decides that the arrays do not tell, which the remedy asks for; else
            "warning".
        evidence: The numbers that the finding rests on, by name.
        message: What was seen, a sentence.
        remedy: What to do, a sentence.
    """

    layer: str
    cause: str
    severity: Literal["error", "question", "warning"]
    evidence: Mapping[str, float]
    message: str
    remedy: str

    def __str__(self) -> str:
        layer = f"{self.layer}: " if self.layer else ""
        return f"{layer}{self.cause} ({self.severity}): {self.message} {self.remedy}"


# Every cause there is, so that a logger gets a curve of each from the first step on.
CAUSES = (
    "averaged-weights",
    "dead",
    "drift",
    "exploding",
    "gap",
    "low-precision",
    "momentum",
    "negative-variance",
    "never-updated",
    "non-finite",
    "replicas",
    "small-batch",
    "unconverged",
    "unlike-batches",
)


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of a diagnosis. It prints as a table, followed by the findings.

    Example:
        >>> import jaxbn
        >>> from jaxbn.diagnose import diagnose
        >>> report = diagnose(jaxbn.init(3))
        >>> report.healthy, report.findings[0].cause
        (False, 'never-updated')

    Attributes:
        findings: What is wrong, errors first, then questions.
        layers: What was measured, layer by layer, in the order of their names.
        passes: How often the model ran on a batch.
        gap: How far evaluation lies from the output with the statistics of the batches, in
            standard deviations of the output; NaN without batches.
        loss: The loss of evaluation; NaN unless `diagnose` was given one.
        loss_of_batches: That with the statistics of the batches, likewise.
    """

    findings: tuple[Finding, ...]
    layers: tuple[LayerReport, ...]
    passes: int = 0
    gap: float = math.nan
    loss: float = math.nan
    loss_of_batches: float = math.nan

    @property
    def healthy(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    @property
    def causes(self) -> set[str]:
        """The causes that were found."""
        return {finding.cause for finding in self.findings}

    def to_dict(self) -> dict[str, float]:
        """Returns the report as numbers under flat names, as loggers take them.

        Returns:
            `errors`, `questions` and `warnings`, how many findings there are;
            `found/CAUSE`, the number of layers with each cause, 0 included; `passes`;
            `gap`, `loss` and `loss_of_batches` where they were measured; and
            `layers/NAME/NUMBER` for what was measured of a layer.

        Example:
            >>> import jaxbn
            >>> from jaxbn.diagnose import diagnose
            >>> numbers = diagnose(jaxbn.init(3)).to_dict()
            >>> numbers["errors"], numbers["found/never-updated"], numbers["found/dead"]
            (1, 1, 0)
        """
        severities = [finding.severity for finding in self.findings]
        numbers: dict[str, float] = {
            "errors": severities.count("error"),
            "questions": severities.count("question"),
            "warnings": severities.count("warning"),
            "passes": self.passes,
        }
        numbers |= {f"found/{cause}": 0 for cause in CAUSES}
        for finding in self.findings:
            numbers[f"found/{finding.cause}"] += 1
        measured = {
            name: getattr(self, name) for name in ("gap", "loss", "loss_of_batches")
        }
        for row in self.layers:
            measured |= {
                f"layers/{row.name}/{name}": getattr(row, name) for name in NUMBERS
            }
        return numbers | {k: n for k, n in measured.items() if not math.isnan(n)}

    def __str__(self) -> str:
        return "\n".join([*self._table(), *self._summary()])

    def plot(self, path: str | PathLike[str]) -> None:
        """Writes a picture of the layers to a file, whose ending chooses the format.

        A dashed line marks where a finding begins; what is beyond it is red, and so are the
        names of the layers where something was found.

        Args:
            path: Where to, such as "report.png".

        Raises:
            ImportError: Matplotlib is not installed.
        """
        title = f"found: {', '.join(sorted(self.causes)) or 'nothing'}"
        draw(path, self.layers, {finding.layer for finding in self.findings}, title)

    def _table(self) -> list[str]:
        causes: dict[str, list[str]] = {}
        for finding in self.findings:
            causes.setdefault(finding.layer, []).append(finding.cause)
        table: list[tuple[str, ...]] = [("layer", "features", *NUMBERS, "found")]
        for row in self.layers:
            numbers = (_short(getattr(row, name)) for name in NUMBERS)
            found = ", ".join(causes.get(row.name, ()))
            table.append((row.name, str(row.features), *numbers, found))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        return [
            "  ".join(
                cell.ljust(width) if i in (0, len(widths) - 1) else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in table
        ]

    def _summary(self) -> list[str]:
        passes = f", {self.passes} forward passes" if self.passes else ""
        if self.healthy:
            return ["", f"{len(self.layers)} layers{passes}, nothing found."]
        groups: dict[str, list[Finding]] = {}
        for finding in self.findings:
            groups.setdefault(finding.cause, []).append(finding)
        lines = []
        for cause, findings in groups.items():
            first = findings[0]
            more = f" and {len(findings) - 1} more" if len(findings) > 1 else ""
            where = f" in {first.layer}{more}" if first.layer else ""
            lines += ["", f"{first.severity.upper()} {cause}{where}"]
            lines += [f"  {first.message}", f"  {first.remedy}"]
        return [*lines, "", f"{len(self.layers)} layers{passes}."]


def _short(number: float) -> str:
    return "-" if math.isnan(number) else f"{number:.3g}"


def as_evidence(**numbers: Any) -> dict[str, float]:
    """Returns the numbers of a finding as Python floats, of which JSON knows."""
    return {name: float(number) for name, number in numbers.items()}
