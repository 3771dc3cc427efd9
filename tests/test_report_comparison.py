"""The section on decompositions: what it is made from, what is refused, and what a browser shows of it."""

from __future__ import annotations

import copy
import html
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lora_compress
import pytest
from lora_compress import PlanError
from lora_compress.ranks import file
from lora_compress.ranks.plan import Plan
from lora_compress.report import comparison, notebook, page

from tests import test_report
from tests.test_report import DATA, HOSTILE, Open, run, text

# Fixtures of the page's own tests.
planned, data, browser, show = test_report.planned, test_report.data, test_report.browser, test_report.show

# Errors relative to those of `ab`, by size.
RATIOS = {"rank 2": {"ab": 1.0, "shared": 1.03, "best": 0.99}, "rank 8": {"ab": 1.0, "shared": 0.98, "best": 0.95}}
# What the chart can show, and words of its axis.
VALUES = {"ratio": "error of ab", "kl": "KL from", "loss": "loss, nats", "error": "relative error"}
LEFT = {"rank 2": 0.8, "rank 8": 0.4}


@pytest.fixture
def compared(data: dict[str, Any]) -> dict[str, Any]:
    """A comparison of the plan's models: at both sizes `shared` is better for queries, and `broken` has failed."""
    matrices = [tensor for tensor in data["tensors"] if "sigma" in tensor]
    exact = [tensor for tensor in data["tensors"] if "sigma" not in tensor and tensor["delta_energy"]]
    rows = []
    for number, (size, ratios) in enumerate(RATIOS.items(), 1):
        nbytes = 40_000 * number**2
        for name, ratio in ratios.items():
            tensors = []
            for tensor in [*matrices, *exact]:
                factor = ratio
                if name == "shared":
                    factor = 0.9 if "q_proj" in tensor["name"] else 1.1
                error = 0.0 if tensor in exact else LEFT[size] * factor
                row = {"rank": 2, "delta_energy": tensor["delta_energy"], "error": error, "bytes": 1}
                row |= {"name": tensor["name"], "decomposition": name if tensor in matrices else ""}
                tensors.append({**row, "error_energy": error**2 * tensor["delta_energy"]})
            sizes = {"size": size, "allowed_bytes": nbytes, "bytes": nbytes - 100 * len(name)}
            measured = {"kl": LEFT[size] * ratio / 10, "loss": 2.0}
            found = {"error": LEFT[size] * ratio, "seconds": 1.5, "problem": None, "tensors": tensors}
            rows.append({**sizes, "decomposition": name, **measured, **found})
        failed: dict[str, Any] = {
            "bytes": 0,
            "error": None,
            "seconds": 0.0,
            "problem": "broken: out of luck",
            "tensors": [],
        }
        rows.append({"size": size, "decomposition": "broken", "allowed_bytes": nbytes, **failed})
    return {
        "schema_version": 1,
        "base": data["base"],
        "tuned": data["tuned"],
        "dtype": "BF16",
        "decompositions": {"ab": "out r, r in", "shared": "layer out r, r in", "broken": "out r, r in"},
        "reference": {"base": {"kl": 0.5, "loss": 3.0}, "tuned": {"kl": 0.0, "loss": 2.0}},
        "seconds": 4.0,
        "warnings": [],
        "rows": rows,
    }


def renamed(value: Any, names: dict[str, str]) -> Any:
    """JSON with other keys and strings."""
    if isinstance(value, dict):
        return {names.get(key, key): renamed(item, names) for key, item in value.items()}
    if isinstance(value, list):
        return [renamed(item, names) for item in value]
    return names.get(value, value) if isinstance(value, str) else value


# Without a browser


def test_the_page_carries_the_comparison_and_is_the_same_bytes_every_time(
    data: dict[str, Any], compared: dict[str, Any]
) -> None:
    document = page(data, compared)
    assert document == page(data, copy.deepcopy(compared))
    assert document == page(data, comparison.checked(compared)), "what has been checked passes again"
    assert test_report.island(document) == data
    found = re.findall(r'<script type="application/json" id="comparison">(.*?)</script>', document, re.DOTALL)
    carried = json.loads(found[0])
    assert [row["error"] for row in carried["rows"]] == [row["error"] for row in compared["rows"]]
    names = [tensor["name"] for tensor in carried["tensors"]]
    assert names == [tensor["name"] for tensor in data["tensors"] if "sigma" in tensor]
    assert all(len(row["errors"]) == len(names) for row in carried["rows"])
    assert html.unescape(notebook(data, compared)).count('id="comparison"') == 1


def test_a_page_without_comparison_has_no_such_section(data: dict[str, Any]) -> None:
    document = page(data)
    assert 'id="decompositions"' not in document
    assert 'id="comparison"' not in document
    assert "Decompositions at" not in document
    assert document.count("<script") == 3


def test_without_scripts_the_totals_of_the_comparison_can_be_read(
    data: dict[str, Any], compared: dict[str, Any]
) -> None:
    found = re.search(r"<noscript>(.*?)</noscript>", page(data, compared), re.DOTALL)
    assert found is not None
    said = html.unescape(found[1])
    assert "Decompositions at rank 2: best has a relative error of 0.7920 with 39,600 bytes; ab has " in said
    assert "Decompositions at rank 8: best has a relative error of 0.3800 with 159,600 bytes; ab has " in said


def test_what_compare_writes_can_be_reported(planned: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, tuned = str(DATA / "base"), str(DATA / "tuned")
    result = lora_compress.compare(base, tuned, sizes=(2, "300kB"), decompositions=("best",))
    (tmp_path / "comparison.json").write_text(json.dumps(result.to_json()))
    file.write(planned, tmp_path / "plan.json")
    asked = ["--comparison", str(tmp_path / "comparison.json"), "-o"]
    assert run("report", str(tmp_path / "plan.json"), *asked, str(tmp_path / "a.html")) == 0
    assert run("report", base, tuned, *asked, str(tmp_path / "b.html")) == 0
    for name in ("a.html", "b.html"):
        assert 'id="decompositions"' in (tmp_path / name).read_text()
    capsys.readouterr()
    assert run("report", str(tmp_path / "plan.json"), *asked, str(tmp_path / "comparison.json"), "--force") == 1
    assert "input" in capsys.readouterr().err
    other = tmp_path / "elsewhere"
    other.mkdir()
    assert run("report", base, str(other), *asked, str(tmp_path / "c.html")) == 1
    assert "of another model: its tuned is" in capsys.readouterr().err
    assert not (tmp_path / "c.html").exists()


def with_row(**fields: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda data: data["rows"][1].update(fields)


def with_tensor(**fields: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda data: data["rows"][0]["tensors"][2].update(fields)


MALFORMED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a plan": (lambda data: data.pop("rows"), "not a comparison"),
    "a later version": (lambda data: data.update(schema_version=2), "schema version 2"),
    "no version": (lambda data: data.pop("schema_version"), "schema version None"),
    "true for 1": (lambda data: data.update(schema_version=True), "schema version True"),
    "no base": (lambda data: data.pop("base"), "`base` is missing"),
    "a path that is none": (lambda data: data.update(tuned=["a"]), "`tuned` is not text"),
    "rows that are none": (lambda data: data.update(rows={"0": 1}), "`rows` is not a list"),
    "no rows": (lambda data: data.update(rows=[]), "no rows"),
    "a row that is none": (lambda data: data["rows"].append(7), "row 9: not an object"),
    "no error": (lambda data: data["rows"][1].pop("error"), "row 2: `error` is missing"),
    "neither error nor problem": (with_row(error=None), "row 2: it has neither"),
    "a negative error": (with_row(error=-0.1), "row 2: `error` is not a number of 0 or more"),
    "an infinite error": (with_row(error=math.inf), "row 2: `error` is not a number"),
    "an error that is none": (with_row(error=True), "row 2: `error` is not a number"),
    "a huge number": (with_row(seconds=10**400), "row 2: `seconds` is not a number"),
    "KL that is none": (with_row(kl="<b>"), "row 2: `kl` is not a number"),
    "bytes that are none": (with_row(bytes=1.5), "row 2: `bytes` is not a count"),
    "negative bytes": (with_row(allowed_bytes=-1), "row 2: `allowed_bytes` is not a count"),
    "a name that is none": (with_row(decomposition=3), "row 2: `decomposition` is not text"),
    "half a character": (with_row(decomposition="\ud800"), r"row 2: '\\ud800' is not text"),
    "a size that is none": (with_row(size=None), "row 2: `size` is not text"),
    "a problem that is none": (with_row(problem=[]), "row 2: `problem` is not text"),
    "twice": (with_row(decomposition="ab"), "twice at one size"),
    "nothing to compare with": (with_row(size="rank 3"), "no error of `ab` at 'rank 3'"),
    "tensors that are none": (with_row(tensors="all"), "row 2: `tensors` is not a list"),
    "a tensor that is none": (lambda data: data["rows"][0]["tensors"].append(None), "tensor .*: not an object"),
    "a tensor's name": (with_tensor(name=None), "row 1: tensor 3: `name` is not text"),
    "a tensor's error": (with_tensor(error=-1), "row 1: tensor 3: `error` is not a number of 0 or more"),
    "a tensor's energy": (with_tensor(delta_energy="1"), "row 1: tensor 3: `delta_energy` is not a number"),
    "a tensor twice": (
        lambda data: data["rows"][0]["tensors"].append(data["rows"][0]["tensors"][0]),
        "row 1: it names a tensor twice",
    ),
    "contractions that are none": (lambda data: data.update(decompositions=[]), "`decompositions` is not an object"),
    "a contraction that is none": (lambda data: data["decompositions"].update(ab=1), "`ab` is not text"),
    "a reference that is none": (lambda data: data["reference"].update(base=1), "reference `base`: not an object"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_what_is_malformed_is_refused(name: str, compared: dict[str, Any], data: dict[str, Any]) -> None:
    change, message = MALFORMED[name]
    change(compared)
    with pytest.raises(PlanError, match=message):
        page(data, compared)


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", '{"rows": NaN}', "\x00", "[" * 100_000])
def test_a_file_that_is_no_comparison_is_refused_by_name(content: str, tmp_path: Path) -> None:
    path = tmp_path / "comparison.json"
    path.write_text(content)
    with pytest.raises(PlanError, match=r"comparison\.json"):
        comparison.read(path)


def test_a_file_is_read_and_its_faults_named_with_it(compared: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "comparison.json"
    path.write_text(json.dumps(compared))
    assert comparison.read(path) == comparison.checked(compared)
    # JSON has no infinity, but numbers that are too large for anything else.
    path.write_text(json.dumps(compared).replace('"seconds": 1.5', '"seconds": 1e999', 1))
    with pytest.raises(PlanError, match=r"comparison.json`: row 1: `seconds` is not a number"):
        comparison.read(path)
    with pytest.raises(FileNotFoundError):
        comparison.read(tmp_path / "none.json")


def test_a_comparison_of_other_models_is_refused(compared: dict[str, Any], data: dict[str, Any]) -> None:
    for side in ("base", "tuned"):
        with pytest.raises(PlanError, match=f"another model: its {side} is `elsewhere/other`"):
            page(data, {**compared, side: "elsewhere/other"})
    # Files move, and paths that end in dots say nothing.
    page(data, {**compared, "base": "/elsewhere/base/", "tuned": ".."})
    first = next(tensor for tensor in compared["rows"][0]["tensors"] if tensor["decomposition"])
    first["delta_energy"] *= 1.01
    with pytest.raises(PlanError, match="changed otherwise in the plan"):
        page(data, compared)
    first["name"] = "model.layers.99.weight"
    with pytest.raises(PlanError, match=r"the plan has no tensor `model\.layers\.99\.weight`"):
        page(data, compared)


# In a browser


def test_charts_table_and_verdict(show: Open, data: dict[str, Any], compared: dict[str, Any]) -> None:
    tab = show(data, compared)
    # The plan is nearest to it.
    assert data["totals"]["bytes"] > 80_000
    assert text(tab, "#verdict").replace("\u00a0", " ") == (
        "At rank 8, best is 5 % below ab; the best single decomposition, shared, is 2 % below. "
        "By KL, best is least: 0.038 against 0.04 of ab."
    )
    rows = tab.run(
        "[...document.querySelectorAll('#comparisons tbody tr:not(.group)')]"
        ".map((row) => [row.className, ...[...row.cells].map((cell) => cell.textContent)])"
    )
    assert len(rows) == len(compared["rows"])
    read = [[cell.replace("\u00a0", " ") for cell in row] for row in rows]
    assert read[0] == ["least", "best (least error)", "39.6 kB", "0.7920", "0.990", "0.0792", "2.0000", "1.5 s"]
    assert read[3] == ["", "broken", "broken: out of luck"]
    assert [row[1] for row in read if row[0] == "least"] == ["best (least error)"] * 2
    assert tab.run("document.querySelectorAll('#compared svg .mark-line path').length") == 3
    points = "document.querySelectorAll('#compared svg .mark-symbol.role-mark path').length"
    assert tab.run(points) == 6
    tab.run("document.querySelectorAll('#series input')[2].click()")
    tab.wait(f"{points} === 4")
    # What has failed everywhere is no line.
    assert tab.run("document.querySelectorAll('#series input').length") == 3
    for value in VALUES:
        tab.run(f"document.querySelector('#measures input[value={value}]').click()")
        tab.wait(f"document.querySelector('#compared').textContent.includes('{VALUES[value]}')")
        assert tab.run(points) == 4
    for number in (0, 1):
        tab.run(f"document.querySelectorAll('#series input')[{number}].click()")
    for value in VALUES:
        tab.run(f"document.querySelector('#measures input[value={value}]').click()")
    tab.wait(f"{points} === 0")


def test_the_best_of_each_tensor(show: Open, data: dict[str, Any], compared: dict[str, Any]) -> None:
    tab = show(data, compared)
    queries = sum("q_proj" in tensor["name"] for tensor in data["tensors"] if "sigma" in tensor)
    matrices = sum("sigma" in tensor for tensor in data["tensors"])
    winners = (
        "[...document.querySelectorAll('#winners tbody tr')].map((row) => [...row.cells].map((c) => c.textContent))"
    )
    for size in ("rank 8", "rank 2"):
        found = {row[0]: (int(row[1]), row[3]) for row in tab.run(winners)}
        assert found == {"ab": (matrices - queries, "1.000"), "shared": (queries, "0.900")}
        assert f"At {size}, ab leaves the least error in {matrices - queries} of {matrices}" in text(
            tab, "#winners-note"
        )
        tab.run(
            """(() => {
              const picker = document.getElementById('compared-size');
              picker.value = 0;
              picker.dispatchEvent(new Event('change'));
            })()"""
        )
    cells = "document.querySelectorAll('#winner-map svg .mark-rect.role-mark path').length"
    colours = (
        "new Set([...document.querySelectorAll('#winner-map svg .mark-rect.role-mark path')]"
        ".map((cell) => cell.getAttribute('fill'))).size"
    )
    assert tab.run(cells) == matrices
    assert tab.run(colours) == 2
    tab.run("document.querySelector('#winner-metrics input[value=gain]').click()")
    tab.wait("document.querySelectorAll('#winner-map svg .role-legend').length > 0")
    assert tab.run(cells) == matrices


VERDICTS: dict[str, tuple[dict[str, float], str]] = {
    "nothing else": ({}, "At rank 8, ab has an error of 0.4000; nothing else has been compared."),
    "one below": ({"shared": 0.75}, "At rank 8, shared is 25 % below ab."),
    "the least of several": ({"shared": 0.75, "other": 0.8}, "At rank 8, shared is 25 % below ab, the least of all."),
    "one above": ({"shared": 1.25}, "At rank 8, shared is 25 % above ab; nothing is below ab."),
    "one equal": ({"shared": 1.0}, "At rank 8, shared is equal to ab; nothing is below ab."),
    "only the mixture": (
        {"best": 0.9, "shared": 1.25},
        "At rank 8, best is 10 % below ab; no single decomposition is below ab.",
    ),
}


@pytest.mark.parametrize("name", VERDICTS)
def test_verdicts(name: str, show: Open, data: dict[str, Any], compared: dict[str, Any]) -> None:
    ratios, expected = VERDICTS[name]
    pair = next(row for row in compared["rows"] if (row["size"], row["decomposition"]) == ("rank 8", "ab"))
    del pair["kl"]
    compared["rows"] = [pair, *({**pair, "decomposition": key, "error": 0.4 * ratios[key]} for key in ratios)]
    assert text(show(data, compared), "#verdict").replace("\u00a0", " ") == expected


def test_hostile_names_stay_text(show: Open, data: dict[str, Any], compared: dict[str, Any]) -> None:
    # Not the last: half a character is refused, as it is in plans.
    names = {"shared": HOSTILE[0], "broken": HOSTILE[4], "rank 8": HOSTILE[1], "layer out r, r in": HOSTILE[2]}
    names |= {"broken: out of luck": HOSTILE[6], data["base"]: HOSTILE[3], data["tuned"]: HOSTILE[0]}
    low_rank = [tensor["name"] for tensor in data["tensors"] if "sigma" in tensor]
    names |= dict(zip(low_rank, HOSTILE[:-1], strict=False))
    plan, said = renamed(data, names), renamed(compared, names)
    document = page(plan, said)
    assert document.count("<script") == document.count("</script") == 4
    for tag in ("<img src=x", "<svg onload"):
        assert tag not in document
    tab = show(plan, said, width=400)
    assert HOSTILE[6] in text(tab, "#comparisons")
    assert r"model.layers.2.\u202etxt.exe" in text(tab, "#comparisons")
    assert tab.run("document.documentElement.scrollWidth") <= 400
    for hidden in ("\u2028", "\u2029", "\u202e"):
        assert hidden not in tab.run("document.getElementById('report').textContent")
    assert tab.run("document.querySelectorAll('img, svg[onload], main script').length") == 0


def test_dark_and_narrow(show: Open, data: dict[str, Any], compared: dict[str, Any]) -> None:
    lines = "document.querySelector('#compared svg .mark-line path').getAttribute('stroke')"
    light = show(data, compared).run(lines)
    tab = show(data, compared, width=360, height=740, dark=True)
    assert tab.run(lines) != light
    assert tab.run("document.documentElement.scrollWidth") <= 360
    right = "Math.max(...[...document.querySelectorAll('.chart svg')].map((svg) => svg.getBoundingClientRect().right))"
    assert tab.run(right) <= 360
    tab.run("document.getElementById('theme').click()")
    tab.wait(f"{lines} === '{light}'")


def test_a_plan_without_a_comparison_shows_no_section(show: Open, data: dict[str, Any]) -> None:
    assert show(data).run("document.getElementById('decompositions')") is None
