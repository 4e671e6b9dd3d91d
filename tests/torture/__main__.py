"""`python -m torture`: the attack, for some minutes or for some kills and mutations.

The exit code is 1 where it finds a fault.
Folders of faulty cases are kept, with what the command printed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import children, figures, fuzz, kills, originals, places, serve

_SHARES = {"kill": 0.08, "together": 0.04, "mutation": 0.88}
"""Share of the time that each part gets."""


def main() -> int:
    """Attack, print what was found, and write the figures where that is wanted."""
    given = _arguments()
    folder = Path(tempfile.mkdtemp(prefix="torture-", dir=given.folder))
    started = time.monotonic()
    children.warm_up()
    originals.stand_in()
    print(f"seed {given.seed}; folder {folder}", flush=True)
    with serve.serving() as mirror:
        made = originals.Originals(folder / "originals")
        if given.case is not None:
            rows = list(_one_case(given, made, folder, mirror))
        else:
            rows = _in_workers(given, made, folder, mirror, started)
    found = figures.Figures.of(rows, seed=given.seed, seconds=time.monotonic() - started)
    for row in rows:
        for fault in row["faults"]:
            print(f"FAULT {row['what']}: {fault}", flush=True)
    print(found.summary, flush=True)
    if given.json is not None:
        Path(given.json).write_text(json.dumps({"summary": found.summary, "rows": rows}), encoding="utf-8")
    if given.page is not None:
        figures.write(Path(given.page), found)
    if not found.faults:
        shutil.rmtree(folder)
    return 1 if found.faults else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m torture", description=__doc__)
    parser.add_argument("--minutes", type=float, help="attack for this long")
    parser.add_argument("--kills", type=int, default=0, help="without --minutes: number of kills")
    parser.add_argument("--crowds", type=int, default=0, help="without --minutes: number of jobs run several at once")
    parser.add_argument("--mutations", type=int, default=0, help="without --minutes: number of mutated files")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**6), help="first seed; drawn by default")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes at once")
    parser.add_argument("--case", type=int, metavar="SEED", help="run one mutation again, or with --kill one kill")
    parser.add_argument("--kill", metavar="JOB", help="with --case: the job to kill, as a fault names it")
    parser.add_argument("--together", metavar="JOB", help="with --case: the job to run several times at once")
    parser.add_argument("--folder", help="folder to make the cases in; that of temporary files by default")
    parser.add_argument("--json", metavar="FILE", help="write all results there")
    parser.add_argument("--page", metavar="FILE", help="write the figures into this page")
    return parser.parse_args()


def _one_case(given: argparse.Namespace, made: originals.Originals, folder: Path, mirror: str) -> Iterator[Any]:
    if given.kill is not None or given.together is not None:
        killer = kills.Killer(made, folder / "cases", mirror)
        if given.kill is not None:
            killed = killer.run(given.kill, given.case)
        else:
            killed = killer.run_together(given.together, given.case)
        yield _killed(killed)
        last = killed.last
    else:
        fuzzer = fuzz.Fuzzer(made, folder / "cases")
        mutated = fuzzer.run(fuzzer.draw(given.case))
        yield _mutated(mutated)
        last = mutated.ended
    print(f"exit code {last.code}, {last.seconds:.1f} s\n--- stdout\n{last.out}--- stderr\n{last.err}---", flush=True)


def _in_workers(
    given: argparse.Namespace, made: originals.Originals, folder: Path, mirror: str, started: float
) -> list[dict[str, Any]]:
    """The rows of all workers, each a forked process that takes every n-th seed."""
    pids = []
    for number in range(given.workers):
        pid = os.fork()
        if pid == 0:
            code = 70
            try:
                with (folder / f"rows-{number}").open("w", encoding="utf-8") as out:
                    for row in _attack(given, number, made, folder / f"cases-{number}", mirror, started):
                        out.write(json.dumps(row) + "\n")
                        out.flush()
                code = 0
            except KeyboardInterrupt:
                code = 128 + signal.SIGINT
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                os._exit(code)
        pids.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    texts = [(folder / f"rows-{number}").read_text(encoding="utf-8") for number in range(given.workers)]
    rows = [json.loads(line) for text in texts for line in text.splitlines()]
    broken = [f"a worker ended with {code}" for code in codes if code]
    return [*rows, *({"part": "attack", "what": text, "kills": 0, "faults": [text]} for text in broken)]


def _attack(
    given: argparse.Namespace, number: int, made: originals.Originals, folder: Path, mirror: str, started: float
) -> Iterator[dict[str, Any]]:
    """One worker's part: adverse places, then kills and mutations in turn."""
    killer, fuzzer = kills.Killer(made, folder, mirror), fuzz.Fuzzer(made, folder)
    for place in places.names()[number :: given.workers] if given.minutes or given.mutations else ():
        yield {"part": "place", "what": place, "kills": 0, "faults": places.run(place, made, folder)}
    seeds = range(given.seed + number, sys.maxsize, given.workers)
    if given.minutes is None:
        names = killer.names(quick=given.kills <= 20)
        left = len(range(number, given.kills, given.workers))
        for seed in seeds:
            if left <= 0:
                break
            row = _killed(killer.run(names[seed * 7 % len(names)], seed))
            left -= row["kills"]
            yield row
        for seed in seeds[: len(range(number, given.crowds, given.workers))]:
            yield _killed(killer.run_together(names[seed * 7 % len(names)], seed), part="together")
        for seed in seeds[: len(range(number, given.mutations, given.workers))]:
            yield _mutated(fuzzer.run(fuzzer.draw(seed)))
        return
    until, spent = started + 60 * given.minutes, dict.fromkeys(_SHARES, 0.0)
    names = killer.names(quick=False)
    for seed in seeds:
        begun = time.monotonic()
        if begun > until:
            return
        part = min(_SHARES, key=lambda each: spent[each] / _SHARES[each])
        job = random.Random(f"job {seed}").choice(names)
        if part == "kill":
            yield _killed(killer.run(job, seed))
        elif part == "together":
            yield _killed(killer.run_together(job, seed), part=part)
        else:
            yield _mutated(fuzzer.run(fuzzer.draw(seed)))
        spent[part] += time.monotonic() - begun


def _killed(result: kills.Result, part: str = "kill") -> dict[str, Any]:
    return {"part": part, "what": str(result), "of": result.job, "kills": result.kills, "faults": result.faults}


def _mutated(result: fuzz.Result) -> dict[str, Any]:
    ended = result.ended
    return {
        "part": "mutation",
        "what": str(result.case),
        "of": result.case.kind,
        "kills": 0,
        "code": ended.code,
        "seconds": ended.seconds,
        "faults": result.faults,
    }


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # libraries that were imported for children need not be taken down
