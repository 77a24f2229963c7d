"""The result of a diagnosis: findings and a table of the layers, and how they print."""

import dataclasses
import math
from collections.abc import Mapping
from os import PathLike
from typing import Any, Literal


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
        severity: "error" where evaluation is wrong or soon will be, else "warning".
        evidence: The numbers that the finding rests on, by name.
        message: What was seen, a sentence.
        remedy: What to do, a sentence.
    """

    layer: str
    cause: str
    severity: Literal["error", "warning"]
    evidence: Mapping[str, float]
    message: str
    remedy: str

    def __str__(self) -> str:
        layer = f"{self.layer}: " if self.layer else ""
        return f"{layer}{self.cause} ({self.severity}): {self.message} {self.remedy}"


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """What was measured of a layer; NaN for what was not.

    Example:
        >>> from jaxbn.diagnose import LayerReport
        >>> LayerReport("bn", 64).momentum
        nan

    Attributes:
        name: The path of the layer among the variables.
        features: How many features it normalizes.
        momentum: The decay that a training step applies; NaN for a cumulative mean or a
            layer that tracks nothing.
        shift: How far the running means lie from those of the batches, in standard
            deviations of the batches, root mean square over the features.
        stretch: The factor between the running standard deviations and those of the
            batches, at least 1, geometric over the features.
        noise: How far the mean of one batch lies from that of all, in standard
            deviations: 1 / sqrt(n) for n independent elements per feature.
        gap: How far the output of the model in evaluation moves by this layer alone, in
            standard deviations of the output.
    """

    name: str
    features: int
    momentum: float = math.nan
    shift: float = math.nan
    stretch: float = math.nan
    noise: float = math.nan
    gap: float = math.nan


_NUMBERS = ("momentum", "shift", "stretch", "noise", "gap")
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
        findings: What is wrong, errors first.
        layers: What was measured, layer by layer, in the order of their names.
    """

    findings: tuple[Finding, ...]
    layers: tuple[LayerReport, ...]

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
            `errors` and `warnings`, how many findings there are; `found/CAUSE`, the number
            of layers with each cause, 0 included; and `layers/NAME/NUMBER` for what was
            measured of a layer.

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
            "warnings": severities.count("warning"),
        }
        numbers |= {f"found/{cause}": 0 for cause in CAUSES}
        for finding in self.findings:
            numbers[f"found/{finding.cause}"] += 1
        for row in self.layers:
            for name in _NUMBERS:
                if not math.isnan(number := getattr(row, name)):
                    numbers[f"layers/{row.name}/{name}"] = number
        return numbers

    def __str__(self) -> str:
        return "\n".join([*self._table(), *self._summary()])

    def plot(self, path: str | PathLike[str]) -> None:
        """Writes a picture of the layers to a file, whose ending chooses the format.

        Args:
            path: Where to, such as "report.png".

        Raises:
            ImportError: Matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(
                "Report.plot draws with matplotlib, which is not installed. Run "
                "pip install 'jaxbn[diagnose]'."
            ) from error
        measured = [name for name in _NUMBERS if not all(map(math.isnan, self._all(name)))]
        marked = {finding.layer for finding in self.findings}
        rows = range(len(self.layers))
        figure = Figure(
            figsize=(3 + 2.5 * max(len(measured), 1), 1.5 + 0.22 * len(rows)),
            layout="constrained",
        )
        axes = figure.subplots(1, max(len(measured), 1), sharey=True, squeeze=False)[0]
        colors = ["tab:red" if row.name in marked else "tab:blue" for row in self.layers]
        for axis, name in zip(axes, measured or ["features"], strict=True):
            # Matplotlib cannot draw bars of a length that is not finite.
            lengths = [n if math.isfinite(n) else 0 for n in self._all(name)]
            axis.barh(rows, lengths, color=colors)
            axis.set_title(name)
        axes[0].set_yticks(rows, [row.name for row in self.layers])
        axes[0].invert_yaxis()
        figure.suptitle(f"found: {', '.join(sorted(self.causes)) or 'nothing'}")
        figure.savefig(path)

    def _all(self, name: str) -> list[float]:
        return [getattr(row, name) for row in self.layers]

    def _table(self) -> list[str]:
        causes: dict[str, list[str]] = {}
        for finding in self.findings:
            causes.setdefault(finding.layer, []).append(finding.cause)
        table: list[tuple[str, ...]] = [("layer", "features", *_NUMBERS, "found")]
        for row in self.layers:
            numbers = (_short(getattr(row, name)) for name in _NUMBERS)
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
        if self.healthy:
            return ["", f"{len(self.layers)} layers, nothing found."]
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
        return lines


def _short(number: float) -> str:
    return "-" if math.isnan(number) else f"{number:.3g}"


def as_evidence(**numbers: Any) -> dict[str, float]:
    """Returns the numbers of a finding as Python floats, of which JSON knows."""
    return {name: float(number) for name, number in numbers.items()}
