from __future__ import annotations

import json

import pytest

from crosspool.bench import report
from crosspool.bench.client import Failure, Record
from crosspool.bench.dialect import Dialect, Fields, Prompt
from crosspool.bench.run import Measurement
from crosspool.bench.server_use import Bytes, ServerUse
from helpers_load import small_load

pytestmark = pytest.mark.unit

USE = ServerUse(42, Bytes(2**20, 3 * 2**20, None), Bytes(None, None, None), 1.5)


def measured(*models: str, **fields: object) -> Measurement:
    """One request to each model: it finished with 3 tokens of 4, in 2 events."""
    dialects = {model: Dialect(Prompt.TOKEN_IDS, Fields.EXACT) for model in models}
    records = [Record(model, 4, 100.0, 100.25, [101.0, 101.5], 102.0, 8, 3) for model in models]
    return Measurement("http://here", small_load(*models, **fields), dialects, 100.0, 104.0, records)


def test_json_has_everything() -> None:
    measurement = measured("a", "b", rate=2.0)
    plain = report.as_plain(measurement, USE, {"command": "crosspool bench"}, requests=True)
    assert json.loads(json.dumps(plain)) == plain
    assert plain["command"] == "crosspool bench"
    assert (plain["seconds"], plain["interrupted"]) == (4.0, False)
    assert plain["load"]["prompt_tokens"] == "8" and "was due" in plain["load"]["latencies"]
    assert plain["models"]["a"]["ttft_ms"]["max"] == 1000
    assert (plain["all"]["requests"], plain["all"]["output_tokens_per_second"]) == (2, 1.5)
    assert plain["asked_with"]["b"] == {"prompt": "token ids", "fields": "ignore_eos, usage", "refusal": None}
    assert plain["server"]["rss"] == {"begin": 2**20, "peak": 3 * 2**20, "end": None}
    assert plain["requests"][0] == {
        "model": "a",
        "due": 0.0,
        "sent": 0.25,
        "events": [1.0, 1.5],
        "ended": 2.0,
        "prompt_tokens": 8,
        "output_tokens": 3,
        "wanted_tokens": 4,
        "failure": None,
    }
    assert "requests" not in report.as_plain(measurement, None, {}, requests=False)


def test_rows() -> None:
    found = report.to_show(measured("a", "b"))
    latencies, counts = report.latency_rows(found), report.count_rows(found)
    assert [row[:2] for row in latencies[:4]] == [("a", "TTFT"), ("a", "TBT"), ("a", "E2E"), ("b", "TTFT")]
    assert latencies[0][2:] == ("1", *["1,000.00"] * 5)
    assert [row[0] for row in counts] == ["a", "b", "(all)"]
    assert counts[2][1:] == ("2", "0 (0.0%)", "16", "6", "1.50", "1.5", "0.50", "1.00")
    assert {len(row) for row in latencies} == {len(report.LATENCY_COLUMNS)}
    assert {len(row) for row in counts} == {len(report.COUNT_COLUMNS)}
    assert [*report.to_show(measured("a"))] == ["a"]


def test_rows_without_values() -> None:
    measurement = measured("a")
    measurement.records.clear()
    assert report.latency_rows(report.to_show(measurement))[0] == ("a", "TTFT", "0", *[""] * 5)


def test_notes_say_what_a_reader_has_to_know() -> None:
    measurement = measured("a")
    measurement.dialects = {"a": Dialect(Prompt.TEXT, Fields.COUNTED, "HTTP 400: no ids")}
    measurement.records += [
        Record("a", 4, 100.0, 100.0, [101.0], 102.0, failure=Failure("cut off", "gone")),
        Record("a", 4, 100.0, 100.0, [101.0], 102.0),
        Record("a", 4, 100.0, 100.0),
    ]
    measurement.interrupted = True
    notes = report.notes(measurement, USE)
    assert notes == [
        report.FROM_SENT,
        "a: cut off: 1 of 4 requests, the first with: gone",
        "a: 4 tokens came of 8 that were asked for",
        "a: 1 answers had no usage: their tokens are counted as events",
        "a: 1 requests were cut off",
        "a: prompts are text, optional fields: usage; to the most exact request the server said "
        "HTTP 400: no ids",
        "the server, process 42: RSS 1 / 3 / ? MiB, PSS ? / ? / ? MiB (begin, peak, end), "
        "1.5 s of processor time",
        "the load took 4.00 s, and this client 0.00 s of a core",
        "interrupted: requests that were running are counted with what had come of them",
    ]


def test_notes_of_an_open_loop() -> None:
    notes = report.notes(measured("a", rate=1.0), None)
    assert notes[0] == report.FROM_DUE
    assert "requests were sent 250.00 ms late (P50), 250.00 ms at most" in notes
