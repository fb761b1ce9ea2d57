"""Every claim of speed, measured by one command: `make bench-all`, under 20 minutes on two otherwise idle cores.

    python tools/bench_all.py [--only NAME ...] [--small] [--patience 1] [--table] [--list]

Each part is a benchmark in a process of its own, on one core or on two. What it claims, JSON lines with `claim`
(`bench.claim`), is kept as it comes, one part's lines replacing those it had before: --only measures some again.
The table of all that is kept is written between the marks of docs/benchmarks.md, and some of its figures into README's
paragraph; --table does that alone. A part that fails, or takes longer than its limit, keeps the lines that it had in
this run, is named below the table, and ends none of the others; the exit code is 1 then. --small tries the command
itself with small problems: nothing is kept.

A new benchmark is a line of `PARTS`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.parts import ROOT, run_part

from fastar.errors import FastarError
from fastar.runs import write_atomically

RESULTS, PAGE = ROOT / "tools" / "results" / "benchmarks.jsonl", ROOT / "docs" / "benchmarks.md"
README = ROOT / "README.md"
# README's paragraph, written where all its figures are known: each the ratio of the claim of a part that begins so.
SAYS = (
    "On one CPU core, matching is {} times faster than PyPI's rebasin (ResNet-18; {} once the star has moved), and a "
    "star {} times faster than in plain PyTorch (ResNet-8; the whole job {}: [benchmarks](docs/benchmarks.md)). "
    "No GPU figure yet."
)
FIGURES = (
    ("matching", "matching a source, from the start"),
    ("matching", "matching a source again, theta an epoch further"),
    ("job", "the star: steps and matching"),
    ("job", "the whole job"),
)
WIDTH = 124  # two lines
SPEED, SPEED_END = "<!-- speed -->", "<!-- end -->"
BEGIN, END = "<!-- table: make bench-all -->", "<!-- end of table -->"
Save = Callable[[list[dict[str, Any]]], None]


@dataclass(frozen=True)
class Part:
    """A benchmark: the cores it runs on, the seconds it may take, its command, and another for a trial."""

    name: str
    cores: int
    limit: float
    command: str
    small: str


REFERENCE = "bench_reference.py --threads 1"
DIGITS = "--dataset digits --arch mlp --images 1437 --epochs 20 --heldouts 5 --rounds 3"
FROM_MEAN = " ".join(f"--star-set star.start=mean star.lr=0.05 star.epochs={epochs}" for epochs in (1, 2, 4))
MATCHING = "bench_matching.py --arch resnet18 --steps 30 --against rebasin --repeats 2 --cache build/bench-networks"
STEP = "bench_step.py --arch resnet18 --width 0.25 --batch 128"
SMALL = "--arch resnet8 --width 0.25 --sources 2"
SMALL_JOB = f"{REFERENCE} {SMALL} --heldouts 1 --images 64 --epochs 1 --points 2 --pairs 1 --rounds 1"
SMALL_MATCHING = f"bench_matching.py {SMALL} --steps 2 --repeats 2 --against rebasin"
SMALL_STEP = f"bench_step.py {SMALL} --batch 8 --size 16 --rounds 2"
LOADER = "bench_loader.py --pipeline cifar10"
STACKED = "bench_stacked.py"
QUALITY = "--seeds 3 --ways random mean --shares 0.1 0.25 1"
PARTS = (
    Part("job", 1, 540, f"{REFERENCE} {FROM_MEAN}", SMALL_JOB),
    Part("job-mlp", 1, 120, f"{REFERENCE} {DIGITS} {FROM_MEAN}", f"{SMALL_JOB} --dataset digits"),
    Part("step", 1, 120, STEP, SMALL_STEP),
    Part("step-2", 2, 120, STEP, SMALL_STEP),
    Part("matching", 1, 420, f"{MATCHING} --sources 4", SMALL_MATCHING),
    Part("matching-2", 2, 240, f"{MATCHING} --sources 2", SMALL_MATCHING),
    Part("loader", 1, 60, f"{LOADER} --images 1500", f"{LOADER} --images 64 --batch 16 --rounds 2"),
    Part("stacked", 1, 60, f"{STACKED} --width 32 --numbers 10 35", f"{STACKED} --width 8 --numbers 3 --rounds 2"),
    Part(
        "quality", 1, 240, f"bench_quality.py {QUALITY}", f"bench_quality.py train.epochs=4 sources.number=2 {QUALITY}"
    ),
    Part("barrier", 1, 90, "bench_barrier.py --images 400", "bench_barrier.py --images 20 --size 16 --batch 8"),
)


def figure(value: float) -> str:
    """Three digits.

    >>> figure(13.27), figure(1234.5), figure(0.15449)
    ('13.3', '1,234', '0.154')
    """
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def seconds(value: float) -> str:
    """
    >>> seconds(13.27), seconds(0.15449)
    ('13.3 s', '154 ms')
    """
    return f"{figure(value)} s" if value >= 1 else f"{figure(value * 1e3)} ms"


def spread(of: Mapping[str, float] | None, n: int) -> str:
    """Median and quartiles of more than one value; a dash where nothing was measured."""
    if of is None:
        return "-"
    around = f" ({figure(of['q25'])} to {figure(of['q75'])})" if n > 1 else ""
    return figure(of["median"]) + around


def row(line: Mapping[str, Any]) -> str:
    """A claim as a row of the table."""
    sides = [seconds(line["s"][side]["median"]) for side in ("ours", "peer")]
    times = [spread(line.get(key), line["n"]) for key in ("times", "cpu_times")]
    cells = [line["claim"], line["peer"], *sides, *times, line["n"], line["cores"]]
    return f"| {' | '.join(map(str, cells))} |"


def table(lines: Iterable[Mapping[str, Any]]) -> str:
    """The kept lines as Markdown: a row for each claim, when and on what they were measured, and what failed."""
    order = {part.name: number for number, part in enumerate(PARTS)}
    known = sorted((line for line in lines if line["part"] in order), key=lambda line: order[line["part"]])
    claims = [line for line in known if "claim" in line]
    text = [
        "| claim | beside | fastar | the other | times faster | of CPU time | n | cores |",
        "|---|---|---|---|---|---|---|---|",
        *map(row, claims),
        "",
    ]
    made = {(line["date"], line["cpu"], line["versions"]["torch"], line["versions"]["commit"]) for line in claims}
    text += sorted(
        {f"{date}: {cpu}, torch {torch}, commit {of.removesuffix('+changes')}." for date, cpu, torch, of in made}
    )
    failed = [f"{line['part']} ({line['failed']})" for line in known if "failed" in line]
    if failed:
        text.append(f"\nNot finished: {'; '.join(failed)}.")
    return "\n".join(text)


def with_table(page: str, made: str) -> str:
    """The page with this table between its marks.

    Raises:
        FastarError: it has no marks.
    """
    begin, end = page.find(BEGIN), page.find(END)
    if begin < 0 or end < begin:
        raise FastarError(f"{PAGE}: has no {BEGIN} and {END} for the table to go between; put them back")
    return f"{page[:begin]}{BEGIN}\n\n{made}\n\n{page[end:]}"


def with_figures(readme: str, lines: Iterable[Mapping[str, Any]]) -> str:
    """README with its paragraph of these lines' figures; as it was where one of them is not known.

    Raises:
        FastarError: it has no marks.
    """
    begin, end = readme.find(SPEED), readme.find(SPEED_END)
    if begin < 0 or end < begin:
        raise FastarError(f"{README}: has no {SPEED} and {SPEED_END} for the paragraph to go between; put them back")
    claims = [line for line in lines if "claim" in line]
    known = [[line for line in claims if line["part"] == part and line["claim"].startswith(of)] for part, of in FIGURES]
    if not all(known):
        return readme
    said = SAYS.format(*(figure(one[0]["times"]["median"]) for one in known))
    words = textwrap.wrap(said, WIDTH, break_on_hyphens=False, break_long_words=False)
    return readme[:begin] + SPEED + "\n".join(words) + readme[end:]


def read(path: Path) -> list[dict[str, Any]]:
    """The lines that are kept; none where nothing was measured yet."""
    if not path.is_file():
        return []
    try:
        return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise FastarError(f"{path}: is damaged ({error}); delete it and measure again") from error


def replaced(kept: Sequence[dict[str, Any]], part: str, new: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The kept lines with those of one part replaced."""
    return [*(line for line in kept if line["part"] != part), *new]


def kept_lines(part: Part, result: Mapping[str, Any], facts: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The kept lines of a part's result: its claims, and how it failed."""
    of_part = {"part": part.name, "cores": part.cores, **facts}
    for line in result["lines"]:
        if "claim" in line:
            yield {**line, **of_part}
    if "exit_code" not in result:  # it runs
        return
    wrong = [line["error"] for line in result["lines"] if "error" in line]
    limit, code = result.get("stopped_after_seconds"), result["exit_code"]
    if limit is not None:
        yield {**of_part, "failed": f"more than {limit:.0f} s"}
    elif wrong or code != 0:
        yield {**of_part, "failed": wrong[0] if wrong else f"exit code {code}"}
    elif not any("claim" in line for line in result["lines"]):
        yield {**of_part, "failed": "claimed nothing"}


def processor() -> str:
    """The name of the processor."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text("utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1).strip() if found else "a CPU"


def measure(part: Part, kept: Sequence[dict[str, Any]], command: str, limit: float, save: Save) -> list[dict[str, Any]]:
    """Run a part; the lines that are kept then, which are saved with each new one."""
    facts = {"date": datetime.date.today().isoformat(), "cpu": processor()}

    def keep(result: Mapping[str, Any]) -> list[dict[str, Any]]:
        lines = replaced(kept, part.name, list(kept_lines(part, result, facts)))
        save(lines)
        return lines

    script, *arguments = command.split()
    begin = time.perf_counter()
    result = run_part(
        part,
        (str(ROOT / "tools" / script), *arguments),
        limit,
        lambda lines: keep({"lines": lines}),  # type: ignore[func-returns-value]
        cores=part.cores,
    )
    found = keep(result)
    failed = [line["failed"] for line in found if line["part"] == part.name and "failed" in line]
    if failed:
        print(result.get("end_of_output", ""), file=sys.stderr)
    told = f"FAILED: {failed[0]}" if failed else "ok"
    claims = sum("claim" in line for line in result["lines"])
    print(f"    {told}, {claims} claims, {time.perf_counter() - begin:.0f} s", flush=True)
    return found


def save_lines(lines: Sequence[Mapping[str, Any]]) -> None:
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(RESULTS, "".join(json.dumps(line) + "\n" for line in lines).encode())


def publish(lines: Sequence[Mapping[str, Any]]) -> None:
    """Write the table, and README's figures."""
    page = with_table(PAGE.read_text(encoding="utf-8"), table(lines))
    readme = with_figures(README.read_text(encoding="utf-8"), lines)
    for path, text in ((PAGE, page), (README, readme)):
        write_atomically(path, text.encode())


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS], help="parts to measure")
    parser.add_argument("--small", action="store_true", help="try the command with small problems; nothing is kept")
    parser.add_argument("--patience", type=float, default=1.0, help="times the limits, on a slow or busy machine")
    parser.add_argument("--table", action="store_true", help="write the table of what is kept, and measure nothing")
    parser.add_argument("--list", action="store_true", help="list the parts and stop")
    return parser.parse_args()


def main() -> int:
    chosen = options()
    parts = [part for part in PARTS if part.name in (chosen.only or [part.name])]
    if chosen.list:
        for part in parts:
            print(f"{part.name}: {part.cores} cores, at most {part.limit:.0f} s: {part.command}")
        return 0
    kept = [] if chosen.small else read(RESULTS)
    if chosen.table:
        publish(kept)
        return 0
    most, there = max(part.cores for part in parts), len(os.sched_getaffinity(0))
    if most > there:
        raise FastarError(f"{most} cores are needed and {there} may be used: leave out parts of {most} with --only")
    for number, part in enumerate(parts, 1):
        limit, command = part.limit * chosen.patience, part.small if chosen.small else part.command
        print(f"{number} of {len(parts)}: {part.name}, at most {limit:.0f} s", flush=True)
        kept = measure(part, kept, command, limit, (lambda lines: None) if chosen.small else save_lines)
        if not chosen.small:
            publish(kept)
    if chosen.small:
        print(table(kept))
    failed = sorted(
        {line["part"] for line in kept if "failed" in line and line["part"] in {part.name for part in parts}}
    )
    where = "nothing kept" if chosen.small else f"the table: {PAGE.relative_to(ROOT)}"
    print(f"failed: {', '.join(failed)}" if failed else f"all parts ran; {where}")
    return 1 if failed else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # the part that runs ends with it
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except FastarError as error:
        print(f"bench_all: {error}", file=sys.stderr)
        sys.exit(2)
