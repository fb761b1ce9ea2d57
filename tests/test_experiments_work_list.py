"""A run folder as a list of work: many processes, random kills, hosts that vanish, a slow file system."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from work_list_workers import DEAD_SECONDS, INTERVALS, Crew

from fastar.config import load_settings

SECONDS = 300  # for a machine with everything else to do; nothing is asserted on time
HOSTS, PROCESSES_OF_A_HOST = 4, 3

MakeCrew = Callable[..., Crew]


@pytest.fixture
def crew_of(tmp_path: Path) -> Iterator[MakeCrew]:
    """Makes a crew for so many sources; its processes end with the test."""
    made: list[Crew] = []

    def make(sources: int, **how: object) -> Crew:
        options = [f"sources.number={sources}", "sources.heldout=0", "device=cpu"]
        made.append(Crew(tmp_path, load_settings(dataset="digits", overrides=options), **how))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for crew in made:
        crew.close()


def wait_until_ended(crew: Crew, watch: Callable[[], object] = lambda: None) -> list[int]:
    """The exit codes of all processes, in the order of their ends; `watch` is called now and then."""
    codes, end = list[int](), time.monotonic() + SECONDS
    while crew.hosts:
        codes += crew.ended()
        watch()
        time.sleep(0.005)
        assert time.monotonic() < end, "the processes hang"
    return codes


@pytest.mark.parametrize(
    ("locks", "models"),
    [
        pytest.param(False, 300, id="no-flock"),
        pytest.param(True, 300, id="flock"),
        pytest.param(False, 1000, id="thousand-no-flock", marks=pytest.mark.slow),
        pytest.param(True, 1000, id="thousand-flock", marks=pytest.mark.slow),
    ],
)
def test_no_work_is_lost_or_done_twice(crew_of: MakeCrew, locks: bool, models: int) -> None:
    """Trainings by 12 processes on 4 hosts. Of 1,000, some 60 processes are killed, each alone or with its host."""
    seed = random.randrange(1 << 32)
    draws, crew = random.Random(seed), crew_of(models, locks=locks, delay=0.004)
    hosts = [f"host{n // PROCESSES_OF_A_HOST}" for n in range(HOSTS * PROCESSES_OF_A_HOST)]
    kills, vanished, next_kill = list[int](), 0, 2 * models

    def begin(host: str) -> None:
        crew.begin(host, draws.randrange(1 << 32))

    def strike() -> None:
        nonlocal vanished, next_kill
        if crew.size() < next_kill or len(kills) >= 75 or not crew.hosts:
            return
        next_kill += draws.randrange(400, 1000) * models // 1000
        host = crew.hosts[draws.choice(list(crew.hosts))]
        whole = draws.random() < 0.08 and vanished < 5
        of_host = [pid for pid, other in crew.hosts.items() if other == host]
        for pid in of_host if whole else [draws.choice(of_host)]:
            crew.kill(pid)
            kills.append(pid)
            begin(f"{host}-after-{vanished}" if whole else host)
        vanished += whole

    for host in hosts:
        begin(host)
    codes = wait_until_ended(crew, strike)
    told = crew.lines()
    assert set(codes) == {0}, (seed, {" ".join(line) for line in told if line[0] == "refused"})
    assert len(kills) >= 40, seed
    assert not [line for line in told if line[0] == "two"], seed
    for kind, number in crew.models:
        wanted = "".join(f"{number} {interval}\n" for interval in range(INTERVALS))
        assert crew.run.model(kind, number).read_text() == wanted, (seed, number)
    check_work(told, kills, crew, seed)
    # What a host that vanished within the last seconds left is not known to be nobody's: the next process removes it.
    time.sleep(DEAD_SECONDS)
    crew.begin("last", 0)
    assert wait_until_ended(crew) == [0]
    assert crew.lines() == told
    assert crew.left() == [], seed


def check_work(told: list[list[str]], kills: list[int], crew: Crew, seed: int) -> None:
    """Every interval was done once, but for those that a killed process was at, which were done once more each."""
    work = [(int(line[1]), int(line[2]), int(line[3])) for line in told if line[0] == "work"]
    times = Counter((number, interval) for number, interval, _ in work)
    assert set(times) == {(number, i) for _, number in crew.models for i in range(INTERVALS)}, seed
    last_of = {pid: (number, interval) for number, interval, pid in work}
    may_again = Counter(last_of[pid] for pid in kills if pid in last_of)
    again = Counter({one: count - 1 for one, count in times.items() if count > 1})
    assert again <= may_again, (seed, again - may_again)


@pytest.mark.parametrize("processes", [1, 3])
def test_a_model_that_fails_leaves_the_others_to_be_trained(crew_of: MakeCrew, processes: int) -> None:
    """By several: one alone says so at once."""
    crew = crew_of(12, failing=[4], together=processes)
    for number in range(processes):
        crew.begin("host", number)
    assert wait_until_ended(crew) == [2] * processes
    told = crew.lines()
    assert [line[1:] for line in told if line[0] == "refused"] == [["source", "4:", "no", "good"]] * processes
    finished = [number for kind, number in crew.models if crew.run.finished(kind, number)]
    assert finished == ([0, 1, 2, 3] if processes == 1 else [number for number in range(12) if number != 4])
    assert crew.left() == []
