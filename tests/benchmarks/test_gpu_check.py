"""The script for ten minutes on a GPU: its own code, where kernels are interpreted; and that whatever happens
to a section's process, what was measured is kept and the others go on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu.results import DONE, FAILED, NOT_MEASURED, Figure, Outcome, at_most

from crosspool.core.config import Mode

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "gpu_check.py"

EXPECTED = {
    "card": {},
    "kernels": {},
    "graphs": {"making a graph"},
    "doorbell": {"host to device", "between multiprocessors"},
    "ffn": {"1 rows, resident", "8 rows, resident"},
    "attention": {},
    "decode": {},
    "sharing": {},
}
"""Of each section, what cannot be measured where kernels are interpreted."""


@pytest.mark.backend
@pytest.mark.parametrize("section", EXPECTED)
def test_every_section_runs_where_kernels_are_interpreted(section: str) -> None:
    from gpu.child import run_cases
    from gpu.device import open_gpu

    torch.set_num_threads(1)
    said: list[dict[str, Any]] = []
    with open_gpu(interpreted=True) as gpu:
        assert run_cases(gpu, section, import_module(f"gpu.{section}").cases(gpu), said.append)
    assert said.pop() == {"end": True}
    outcomes = [Outcome.of(line) for line in said if "status" in line]
    assert len(outcomes) == len(said) // 2 > 0
    for outcome in outcomes:
        assert outcome.status == (NOT_MEASURED if outcome.case in EXPECTED[section] else DONE), outcome
        assert outcome.status == NOT_MEASURED or outcome.figures
        if section == "kernels":
            assert not any(figure.short for figure in outcome.figures), outcome


@pytest.mark.backend
def test_bytes_that_are_read_are_those_of_the_weights() -> None:
    """Of a layer's FFN that is read wholly, and of a step that reads all experts."""
    from gpu.decode import bytes_of_step
    from gpu.ffn import _bytes

    from crosspool.models.geometries import GEOMETRIES
    from crosspool.models.registry import read_spec

    plain = read_spec(GEOMETRIES / "qwen3-30b-a3b")
    for spec in (plain, plain.with_float8(range(plain.num_layers))):
        assert _bytes(spec, 3, 128) == spec.ffn_bytes(3)
        one = 3 * 2048 * 768 * 2 if spec is plain else 3 * 2048 * 768 + 4 * 3 * 16 * 6
        assert _bytes(spec, 3, 8) == 128 * 2048 * 2 + 8 * one
        read = bytes_of_step(spec, 10_000, 0.0)
        embedding = spec.vocab_size * spec.hidden_size * spec.dtype.bytes
        norm = spec.hidden_size * spec.dtype.bytes
        whole = spec.attention_side_bytes + spec.total_ffn_bytes - embedding - norm
        assert read == pytest.approx(whole, abs=1)


@pytest.mark.backend
def test_an_engine_that_does_not_start_is_started_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu import decode
    from gpu.device import open_gpu
    from gpu.results import NotMeasured

    starts: list[Any] = []

    def start(*given: Any) -> None:
        starts.append(given)
        raise RuntimeError("CUDA driver error 1")

    monkeypatch.setattr(decode, "start_engine", start)
    with open_gpu(interpreted=True) as gpu:
        model = decode.Model(gpu)
        with pytest.raises(RuntimeError):
            _ = model.engine
        with pytest.raises(NotMeasured, match="did not start"):
            _ = model.engine
        model.close()
    assert len(starts) == 1


@pytest.mark.backend
def test_models_that_share_a_card_are_in_float8_if_it_is_too_small(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from gpu.device import open_gpu
    from gpu.interpreted import CpuDevice
    from gpu.sharing import USABLE, Zoo, bits

    with open_gpu(interpreted=True) as gpu:
        plain, float8 = Zoo(gpu, tmp_path, 2), Zoo(gpu, tmp_path, 2, "float8")
        assert plain.fitting is plain and bits(plain).value == 16
        assert float8.device_bytes < plain.device_bytes
        monkeypatch.setattr(CpuDevice, "free_bytes", int(2 * float8.device_bytes / USABLE) + 1)
        small = Zoo(gpu, tmp_path, 2)
        assert not small.fits and small.fitting.fits
        assert small.fitting.specs == float8.specs and bits(small.fitting).value == 8
        config = small.fitting.config(Mode.CROSSPOOL)
        assert {model.weights_dtype for model in config.models} == {"float8"}


@pytest.mark.backend
def test_kernels_that_are_wrong_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu import kernels_products
    from gpu.device import open_gpu

    true = kernels_products.reference.rms_norm
    monkeypatch.setattr(kernels_products.reference, "rms_norm", lambda *given: 1.02 * true(*given))
    with open_gpu(interpreted=True) as gpu:
        figures = kernels_products.norms(gpu, 45, torch.bfloat16)
    assert [figure.short for figure in figures] == [False, True, True, False]


def script(*options: str, **how: Any) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, **how)


@pytest.mark.integration
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = script("--only", "card", "--json", str(tmp_path / "it.json"))
    assert done.returncode == 2
    assert "no GPU to measure" in done.stderr


@pytest.mark.integration
def test_the_whole_way_from_the_script_to_its_json(tmp_path: Path) -> None:
    file = tmp_path / "it.json"
    done = script("--interpret", "--only", "card", "--only", "graphs", "--json", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "means anything" in done.stdout
    whole = json.loads(file.read_text())
    assert whole["interpreted"] and whole["about"]["torch"] == torch.__version__
    assert [one["case"] for one in whole["outcomes"]][:2] == ["limits", "a chain of nodes"]
    assert any("making a graph" in line for line in whole["not_measured"])


FAKE = """
import json, os, sys, time

def say(**line):
    print(json.dumps(line), flush=True)

def done(case):
    say(section=sys.argv[1], case=case, status="done", seconds=0.0, reason="", details="",
        figures=[dict(name="it", value=1.0, unit="", target=2.0, at_least=True)])

CASES = ["a", "b", "c", "d"]
section, skip = sys.argv[1], int(sys.argv[3])
if section == "doorbell":
    print("broken from the first line", file=sys.stderr)
    sys.exit(1)
for number, case in enumerate(CASES):
    if number < skip:
        continue
    say(begin=case, number=number, limit=3.0)
    print("a line of somebody else's")
    if section == "ffn" and case == "b":
        print("illegal memory access", file=sys.stderr, flush=True)
        os.abort()
    if section == "attention" and case in "ac":
        time.sleep(60)
    done(case)
say(end=True)
"""


@pytest.fixture
def run_fake(tmp_path: Path) -> Any:
    from gpu.report import Report
    from gpu.run import Runner

    program, file = tmp_path / "fake.py", tmp_path / "it.json"
    program.write_text(FAKE)

    def run(*sections: str, seconds: float = 600.0) -> tuple[dict[str, Any], int]:
        report = Report(file, interpreted=False)
        assert Runner(report, [sys.executable, str(program)], seconds).run(sections) is None
        status = report.finish()
        return json.loads(file.read_text()), status

    return run


def told(whole: dict[str, Any]) -> list[tuple[str, str, str]]:
    return [(one["section"], one["case"], one["status"]) for one in whole["outcomes"]]


@pytest.mark.unit
def test_a_process_that_dies_or_hangs_costs_one_case(run_fake: Any) -> None:
    whole, status = run_fake("ffn", "attention", "doorbell", "graphs")
    assert told(whole) == [
        *(("ffn", case, FAILED if case == "b" else DONE) for case in "abcd"),
        *(("attention", case, FAILED if case in "ac" else DONE) for case in "abcd"),
        ("doorbell", "its begin", FAILED),
        *(("graphs", case, DONE) for case in "abcd"),
    ]
    details = {(one["section"], one["case"]): one["details"] for one in whole["outcomes"]}
    assert "illegal memory access" in details["ffn", "b"]
    assert "broken from the first line" in details["doorbell", "its begin"]
    assert status == 1
    assert len(whole["not_measured"]) == 4
    assert len(whole["short"]) == 9


@pytest.mark.unit
def test_without_time_nothing_is_begun(run_fake: Any) -> None:
    whole, status = run_fake("ffn", "graphs", seconds=1.0)
    assert told(whole) == [("ffn", "the rest", NOT_MEASURED), ("graphs", "the rest", NOT_MEASURED)]
    assert status == 0


@pytest.mark.unit
def test_what_is_short_of_its_target() -> None:
    assert Figure("a", 0.8, target=0.85).short and not Figure("a", 0.85, target=0.85).short
    assert at_most("a", 2.1, "ms", 2.0).short and not at_most("a", 2.0, "ms", 2.0).short
    assert Figure("a", float("nan"), target=0.1).short and at_most("a", float("nan"), "", 0.1).short
    assert not Figure("a", 0.0).short
    outcome = Outcome("ffn", "it", DONE, 1.5, (Figure("a", 0.8, "x", 0.85),))
    assert Outcome.of(json.loads(json.dumps(outcome.plain()))) == outcome


ALONE = """
import importlib, pkgutil, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {refused!r}:
            raise ModuleNotFoundError(f"{{name}} is not on this machine", name=name)

sys.meta_path.insert(0, Refuse())
import gpu
for module in pkgutil.iter_modules(gpu.__path__, "gpu."):
    if module.name != "gpu.interpreted":
        importlib.import_module(module.name)
"""


@pytest.mark.integration
def test_it_needs_little_but_torch_and_triton() -> None:
    refused = {
        "llvmlite",
        "msgspec",
        "numba",
        "psutil",
        "pyarrow",
        "pydantic",
        "pytest",
        "scipy",
        "transformers",
    }
    folders = os.pathsep.join(str(ROOT / name) for name in ("src", "benchmarks", "tests"))
    program = [sys.executable, "-c", ALONE.format(refused=refused)]
    environment = {**os.environ, "PYTHONPATH": folders}
    done = subprocess.run(program, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
