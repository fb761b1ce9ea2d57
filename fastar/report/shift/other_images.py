"""Tables of how well averages tell other images from their own, from `uncertainty.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from fastar.report.results import shown, task_name

SCORES = (("confidence", "1 - confidence"), ("entropy", "entropy"), ("mutual information", "mutual information"))
METRICS = (("auroc", "AUROC"), ("aupr", "AUPR"), ("fpr_95", "FPR at 95 %"))


def other_tables(found: Mapping[str, Any]) -> list[Table]:
    """A table for each set of other images: AUROC, AUPR and FPR of three scores, other images being what is found."""
    tables = []
    for name, of in found.get("ood", {}).items():
        title = (
            f"{task_name(found)}: {of['samples']:,} images of {name} told from {found['samples']:,} {found['split']}"
        )
        table = Table(title=f"{title} images", title_justify="left")
        for column in ("average of", "n", "by", *(name for _, name in METRICS)):
            table.add_column(column, justify="left" if column in ("average of", "by") else "right")
        for family, one in of["families"].items():
            for score, said in SCORES:
                if score in one:
                    first = score == "confidence"
                    start = (family, str(one["repetitions"])) if first else ("", "")
                    table.add_row(*start, said, *(shown(one[score][metric]) for metric, _ in METRICS))
        tables.append(table)
    return tables
