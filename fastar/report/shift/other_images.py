"""Tables of how well averages tell other images from their own, from `uncertainty.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from fastar.report.results import new_table, shown, task_name

SCORES = (("confidence", "1 - confidence"), ("entropy", "entropy"), ("mutual information", "mutual information"))
METRICS = (("auroc", "AUROC"), ("aupr", "AUPR"), ("fpr_95", "FPR at 95 %"))


def other_tables(found: Mapping[str, Any]) -> list[Table]:
    """A table for each set of other images: AUROC, AUPR and FPR of three scores, other images being what is found."""
    tables = []
    for name, of in found.get("ood", {}).items():
        told = f"{of['samples']:,} images of {name} told from {found['samples']:,} {found['split']} images"
        columns = ("average of", "n", "by", *(name for _, name in METRICS))
        table = new_table(f"{task_name(found)}: {told}", *columns, words=(0, 2))
        for family, one in of["families"].items():
            for score, said in SCORES:
                if score in one:
                    first = score == "confidence"
                    start = (family, str(one["repetitions"])) if first else ("", "")
                    table.add_row(*start, said, *(shown(one[score][metric]) for metric, _ in METRICS))
        tables.append(table)
    return tables
