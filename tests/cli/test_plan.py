from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from crosspool.cli.app import app
from crosspool.cli.planned import planned_settings
from crosspool.cli.settings import ModelEntry
from crosspool.core.config import SchedulerConfig
from crosspool.core.errors import ConfigError
from crosspool.models.geometries import GEOMETRIES, geometry_names
from crosspool.models.registry import read_spec
from crosspool.planner.trace import HOUR
from helpers_traces import one_page_trace, poisson_starts, write_parquet

pytestmark = pytest.mark.unit

THREE = "Qwen3-30B-A3B,deepseek-ai/DeepSeek-V2-Lite,glm-4.7-flash"
WORKLOAD = """
hours = 12
[[models]]
model = "Qwen3-30B-A3B"
name = "chat"
rate = 0.02
prompt_tokens = { median = 800, p99 = 8000 }
output_tokens = { median = 300, p99 = 1600 }
[[models]]
model = "Qwen3-30B-A3B"
rate = 0.01
burst = 3
prompt_tokens = { median = 100, p99 = 1000 }
output_tokens = { median = 30, p99 = 600 }
"""


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    starts = poisson_starts(np.random.default_rng(0), [30.0, 20.0, 10.0, 5.0], 8)
    starts[0] = np.append(starts[0], 8 * HOUR - 1)
    return write_parquet(tmp_path_factory.mktemp("trace") / "t.parquet", one_page_trace(starts, 8))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


def refusal(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    return result.stderr


def test_tables(trace: Path) -> None:
    result = run("--models", THREE, "--trace", trace, "--risk", "0.01")
    assert result.exit_code == 0, result.output
    rows = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert rows[0].startswith("Plan from ") and "requests of 4 models in 8.0 h" in rows[0]
    assert any(row.startswith("KV pool") and "--kv-pool-bytes" in row for row in rows)
    assert any(row.startswith("goal at most 1% of requests wait, in 90% of windows") for row in rows)
    assert any(row.startswith("past windows within the goal") and row.endswith("of 2 h each") for row in rows)
    for name in ("two pools (CrossPool)", "static partition", "monolithic, elastic KV", "99.9%"):
        assert any(row.startswith(name) for row in rows)
    # The fourth index is the first model's second turn.
    assert any(row.startswith("Qwen3-30B-A3B#2 40,960") for row in rows)


def test_json_plot_and_saved_plan(trace: Path, tmp_path: Path) -> None:
    saved, page, picture = tmp_path / "plan.json", tmp_path / "plan.html", tmp_path / "plan.png"
    result = run("--models", THREE, "--trace", trace, "--json", "--save", saved, "--plot", page)
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert plan == json.loads(saved.read_text())
    wanted = {
        "kv_pool_bytes",
        "interval",
        "quantiles",
        "sum_of_peaks_bytes",
        "coverage",
        "baselines",
        "modes",
    }
    assert wanted <= set(plan) and set(plan["quantiles"]) == {"by_time", "by_request"}
    assert plan["models"] == [
        "Qwen3-30B-A3B#1",
        "deepseek-ai/DeepSeek-V2-Lite",
        "glm-4.7-flash",
        "Qwen3-30B-A3B#2",
    ]
    assert "<svg" in page.read_text() and "Ways to place it" in page.read_text()
    assert run("--models", THREE, "--trace", trace, "--plot", picture).exit_code == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_rates_and_lengths_in_place_of_a_trace(tmp_path: Path) -> None:
    workload = tmp_path / "zoo.toml"
    workload.write_text(WORKLOAD)
    plan = json.loads(run("--workload", workload, "--json").stdout)
    assert plan["models"] == ["chat", "Qwen3-30B-A3B"] and plan["trace"]["hours"] == 12
    assert plan["trace"]["requests"] == pytest.approx(0.03 * 12 * 3600, rel=0.15)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("rate = 0.02", "rate = -2"), "models[0]: a rate must be at least 0 requests a second, not -2"),
        (("rate = 0.02", ""), "models[0] lacks the key 'rate'"),
        (("rate = 0.02", "rate = 'x'"), "models[0]: rate must be a number, not 'x'"),
        (("p99 = 8000", "p99 = 8"), "models[0]: prompt_tokens: 1 <= median <= p99 is needed"),
        (("burst = 3", "bursts = 3"), "unknown key 'bursts' in models[1]"),
        (("hours = 12", "days = 12"), "unknown key 'days'"),
        (('name = "chat"', ""), "two models are called 'Qwen3-30B-A3B'"),
        (("[[models]]", "[models"), "is not valid TOML"),
    ],
)
def test_workloads_that_cannot_be(tmp_path: Path, change: tuple[str, str], said: str) -> None:
    workload = tmp_path / "zoo.toml"
    workload.write_text(WORKLOAD.replace(*change))
    assert said in refusal("--workload", workload)


def test_a_model_may_be_a_folder_or_its_config(trace: Path) -> None:
    folder = GEOMETRIES / "mixtral-8x7b-v0.1"
    sizes = [
        json.loads(run("--models", model, "--trace", trace, "--json").stdout)["kv_pool_bytes"]
        for model in (folder, folder / "config.json", "Mixtral-8x7B-v0.1")
    ]
    assert sizes[0] == sizes[1] == sizes[2]


def test_every_public_name_has_a_geometry() -> None:
    assert {"qwen3-30b-a3b", "deepseek-v2-lite", "glm-4.7-flash"} <= set(geometry_names())
    for name in geometry_names():
        assert read_spec(GEOMETRIES / name).kv_bytes_per_token > 0


def test_what_cannot_be_planned_is_named(trace: Path, tmp_path: Path) -> None:
    assert "no model 'GPT-9'" in refusal("--models", "GPT-9", "--trace", trace)
    assert "give --trace FILE or --workload FILE" in refusal("--models", THREE)
    assert "--models is needed" in refusal("--trace", trace)
    assert "there is no file" in refusal("--models", THREE, "--trace", tmp_path / "none.parquet")
    assert "risk must be between 0 and 1, not 2" in refusal("--models", THREE, "--trace", trace, "--risk", 2)
    assert "the trace has 8 hours" in refusal("--models", THREE, "--trace", trace, "--fit-hours", 9)
    assert "must be like MODEL=HOURS" in refusal("--models", THREE, "--trace", trace, "--since", "x")
    assert "there is no folder" in refusal(
        "--models", THREE, "--trace", trace, "--save", tmp_path / "a" / "b"
    )
    assert "ends with one of" in refusal("--models", THREE, "--trace", trace, "--plot", tmp_path / "a.txt")
    memory = ("--device-memory", "1GiB")
    assert "bytes on each KV device" in refusal("--models", THREE, "--trace", trace, *memory)


def test_serving_takes_size_and_admission_from_a_plan(trace: Path, tmp_path: Path) -> None:
    saved = tmp_path / "plan.json"
    run("--models", THREE, "--trace", trace, "--save", saved, "--tbt-ms", "25")
    plan = json.loads(saved.read_text())
    entry = ModelEntry(place="/models/Qwen3-30B-A3B/", base=tmp_path)
    settings = planned_settings(saved, [entry, ModelEntry(place="x", base=tmp_path, name="GLM-4.7-Flash")])
    assert settings.pools == {"kv_pool_bytes": plan["kv_pool_bytes"], "page_bytes": plan["page_bytes"]}
    # The plan's limit is below the usual one, which stays.
    assert plan["admission"]["max_running"] < SchedulerConfig().max_running
    assert settings.scheduler == {"max_running": SchedulerConfig().max_running, "tbt_target": 25_000_000}
    plan["admission"]["max_running"] = 1000
    saved.write_text(json.dumps(plan))
    assert planned_settings(saved, [entry]).scheduler["max_running"] == 1000
    with pytest.raises(ConfigError, match="not for 'other'"):
        planned_settings(saved, [ModelEntry(place="models/other", base=tmp_path, name="other")])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 7}, "is no plan of format 1"),
        ({"kv_pool_bytes": 0}, "kv_pool_bytes must be above 0, not 0"),
        ({"page_bytes": "4096"}, "page_bytes cannot be '4096'"),
        ({"admission": None}, "admission cannot be None"),
    ],
)
def test_files_that_are_no_plan(tmp_path: Path, change: dict[str, object], said: str) -> None:
    good = {
        "format": 1,
        "models": ["a"],
        "kv_pool_bytes": 4096,
        "page_bytes": 4096,
        "admission": {"risk": 0.1, "max_running": 2, "tbt_target_ms": 40},
    }
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(good))
    assert planned_settings(path, []).pools["kv_pool_bytes"] == 4096
    path.write_text(json.dumps(good | change))
    with pytest.raises(ConfigError, match=said):
        planned_settings(path, [])


def test_serve_asks_for_both_options(tmp_path: Path) -> None:
    for arguments in (["--kv-pool", "plan"], ["--plan", "p.json"], ["--kv-pool", "4GiB", "--plan", "p.json"]):
        result = CliRunner().invoke(app, ["serve", "m", *arguments])
        assert result.exit_code == 2 and "belong together" in result.stderr
    both = ["--kv-pool", "plan", "--plan", "p.json", "--kv-pool-bytes", "4GiB"]
    assert "only one of them" in CliRunner().invoke(app, ["serve", "m", *both]).stderr
    missing = ["--kv-pool", "plan", "--plan", str(tmp_path / "p.json")]
    assert "cannot read the plan" in CliRunner().invoke(app, ["serve", "m", *missing]).stderr


def test_serving_does_not_load_the_planner() -> None:
    """Numba looks for SciPy when it is imported; none of its parts, nor Parquet, are for serving."""
    code = (
        "import sys, crosspool.cli.app, crosspool.cli.planned, crosspool.server.run\n"
        "import crosspool.build.runtime\n"
        "print([name for name in ('scipy.fft', 'scipy.stats', 'scipy.optimize', 'pyarrow', "
        "'crosspool.planner.law') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_weights_are_counted_as_they_are_held(trace: Path) -> None:
    spec = read_spec(GEOMETRIES / "qwen3-30b-a3b")
    sizes = {}
    for dtype in ("auto", "float8", "int8"):
        result = run("--models", "Qwen3-30B-A3B", "--trace", trace, "--json", "--weights-dtype", dtype)
        assert result.exit_code == 0, result.output
        sizes[dtype] = json.loads(result.stdout)["weights_pool_bytes"]
    models = sizes["auto"] // spec.total_ffn_bytes
    assert sizes["auto"] == models * spec.total_ffn_bytes
    assert sizes["float8"] == models * spec.with_float8(range(48)).total_ffn_bytes < 0.51 * sizes["auto"]
    assert sizes["int8"] == models * read_spec(GEOMETRIES / "qwen3-30b-a3b", "auto", "int8").total_ffn_bytes
    said = refusal("--models", "Qwen3-30B-A3B", "--trace", trace, "--weights-dtype", "int4")
    assert "--weights-dtype must be auto, int8, float8, not 'int4'" in said
