"""One section, in a process of its own: says what it begins and what came of it, a JSON object a line."""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from gpu.device import Gpu, NoGpuError, open_gpu
from gpu.results import DONE, FAILED, NOT_MEASURED, Case, NotMeasured, Outcome

NO_GPU, LOST = 2, 4
"""Exit statuses. LOST: after an error the GPU answers nothing any more, and a new process is needed."""

Say = Callable[[dict[str, Any]], None]


def run_cases(
    gpu: Gpu, section: str, cases: Sequence[Case], say: Say, skip: int = 0, seconds: float = 1e9
) -> bool:
    """Run all but the first ``skip`` cases, as far as time goes. Returns whether the GPU still answers."""
    end = time.monotonic() + seconds
    for number, case in enumerate(cases):
        if number < skip:
            continue
        say({"begin": case.name, "number": number, "limit": case.limit})
        if time.monotonic() > end:
            say(Outcome(section, case.name, NOT_MEASURED, reason="no time was left").plain())
            continue
        say(_outcome(gpu, section, case).plain())
        if gpu.lost:
            return False
    say({"end": True})
    return True


def _outcome(gpu: Gpu, section: str, case: Case) -> Outcome:
    begin = time.monotonic()
    try:
        figures = tuple(case.run())
        gpu.device.finish()
    except NotMeasured as why:
        return Outcome(section, case.name, NOT_MEASURED, time.monotonic() - begin, reason=str(why))
    except Exception as error:
        return Outcome(
            section,
            case.name,
            FAILED,
            time.monotonic() - begin,
            reason=f"{type(error).__name__}: {error}",
            details=traceback.format_exc(),
        )
    return Outcome(section, case.name, DONE, time.monotonic() - begin, figures)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("section")
    parser.add_argument("--skip", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--interpret", action="store_true")
    options = parser.parse_args()
    try:
        with open_gpu(interpreted=options.interpret) as gpu:
            module = import_module(f"gpu.{options.section}")
            if hasattr(module, "describe"):
                _say({"about": module.describe()})
            cases = module.cases(gpu)
            alive = run_cases(gpu, options.section, cases, _say, options.skip, options.seconds)
    except NoGpuError as error:
        print(error, file=sys.stderr)
        return NO_GPU
    return 0 if alive else LOST


def _say(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    sys.exit(main())
