"""The HTML report: what it is made of, and what it does in a real browser (skipped where there is none)."""

from __future__ import annotations

import copy
import html
import json
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lora_compress
import pytest
from lora_compress import cli
from lora_compress.ranks import file
from lora_compress.ranks.choice import choose
from lora_compress.ranks.plan import Plan
from lora_compress.ranks.recognise import recognise
from lora_compress.report import notebook, page
from lora_compress.verbs.plan import plan as make_plan

from tests.chromium import Browser, Tab, executable

DATA = Path(lora_compress.__file__).parent / "demo" / "data"
HOSTILE = (
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "'\"><svg onload=alert(1)>.layers.3.q",
    "model.layers.1.\u2028alert(1)\u2029.weight",
    "model.layers.2.\u202etxt.exe",
    "model.layers.0." + "x" * 300 + ".weight",
    "{{script}} <!-- <script> &lt;",
    "\ud800 lone $(touch x) `touch x` \\ ' \n \0",
)
SHELL = '-x it\'s \\ \n `touch x` $(touch x) "$HOME" é 𝛥'
DRAWN = "document.documentElement.dataset.drawn === 'true'"
BUDGETS = ("30kB", "64kB", "100kB", "250kB", "0.5 MiB", "700001", "5MB")

Open = Callable[..., Tab]


@pytest.fixture(scope="module")
def planned() -> Plan:
    return make_plan(DATA / "base", DATA / "tuned")


@pytest.fixture(scope="module")
def data(planned: Plan) -> dict[str, Any]:
    return file.to_json(planned)


def hostile(data: dict[str, Any]) -> dict[str, Any]:
    """The plan with names that try to be more than names."""
    result = copy.deepcopy(data)
    low_rank = [tensor for tensor in result["tensors"] if "sigma" in tensor]
    exact = [tensor for tensor in result["tensors"] if "sigma" not in tensor]
    for number, name in enumerate(HOSTILE):
        low_rank[number]["name"] = name
        exact[number]["name"] = name
    result["base"] = result["tuned"] = HOSTILE[0]
    result["warnings"] = list(HOSTILE)
    result["options"]["exclude"] = [HOSTILE[1], HOSTILE[4], SHELL]
    return result


def island(document: str) -> dict[str, Any]:
    """The JSON object that a page carries."""
    found = re.findall(r'<script type="application/json" id="plan">(.*?)</script>', document, re.DOTALL)
    assert len(found) == 1
    value: dict[str, Any] = json.loads(found[0])
    return value


# Without a browser


def test_the_page_carries_the_plan_and_is_the_same_bytes_every_time(data: dict[str, Any]) -> None:
    document = page(data)
    assert document == page(copy.deepcopy(data))
    assert island(document) == data
    assert document.startswith("<!DOCTYPE html>")
    assert "\r" not in document, "a parser would change it, and with it the hash of a script"
    assert "{{" not in re.sub(r"<script>.*?</script>", "", document, flags=re.DOTALL)


def test_names_cannot_become_markup(data: dict[str, Any]) -> None:
    document = page(hostile(data))
    assert island(document) == hostile(data)
    assert document.count("<script") == document.count("</script") == 3
    for tag in ("<img src=x", "<svg onload"):
        assert tag not in document
    document.encode()


def test_nothing_is_fetched_from_anywhere(data: dict[str, Any]) -> None:
    document = page(data)
    markup = re.sub(r"<script.*?</script>", "", document, flags=re.DOTALL)
    assert not re.search(r"https?://|\bsrc=|\bhref=|@import|url\(", markup)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', document)
    assert policy is not None
    assert policy[1].startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-eval" not in policy[1]
    assert "unsafe-inline" not in policy[1].partition("style-src")[0]


def test_without_scripts_the_totals_can_be_read(data: dict[str, Any]) -> None:
    found = re.search(r"<noscript>(.*?)</noscript>", page(data), re.DOTALL)
    assert found is not None
    assert f"{data['totals']['bytes']:,} bytes" in html.unescape(found[1])


def test_a_notebook_gets_the_page_in_a_frame(data: dict[str, Any]) -> None:
    frame = notebook(data, height=700)
    found = re.fullmatch(r'<iframe srcdoc="([^"]*)" .*height="700".*></iframe>', frame, re.DOTALL)
    assert found is not None
    assert html.unescape(found[1]) == page(data)
    assert 'sandbox="allow-scripts"' in frame


def test_the_command_writes_a_report_and_keeps_what_exists(
    planned: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write(planned, tmp_path / "plan.json")
    out = tmp_path / "report.html"
    arguments = ["report", str(tmp_path / "plan.json"), "-o", str(out)]
    assert run(*arguments, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["bytes"] == out.stat().st_size
    assert told["totals"]["bytes"] == planned.nbytes
    before = out.read_bytes()
    assert run(*arguments) == 1
    assert "--force" in capsys.readouterr().err
    assert out.read_bytes() == before
    assert run(*arguments, "--force", "--quiet") == 0
    assert capsys.readouterr().out == ""
    assert run("report", str(DATA / "base"), str(DATA / "tuned"), "-o", str(tmp_path / "other.html")) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.html", "plan.json", "report.html"]


def run(*arguments: str) -> int:
    """Run the report command, whether or not the group lists it yet."""
    cli.COMMANDS.setdefault("report", ("report", "Write a plan as an HTML page."))
    return cli._run(list(arguments))


# In a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = executable()
    if program is None:
        pytest.skip("no Chromium found: install one, or name it in LORA_COMPRESS_CHROMIUM")
    started = Browser(program, tmp_path_factory.mktemp("profile"))
    yield started
    started.close()


@pytest.fixture
def show(browser: Browser, tmp_path: Path) -> Iterator[Open]:
    """Open a plan's page; afterwards it must have been quiet: no error, no request, no dialog."""
    tabs: list[Tab] = []

    def call(plan_json: dict[str, Any], comparison_json: dict[str, Any] | None = None, **options: Any) -> Tab:
        path = tmp_path / f"{len(tabs)}.html"
        path.write_text(page(plan_json, comparison_json), encoding="utf-8")
        tab = Tab(browser, **options)
        tabs.append(tab)
        tab.open(path, DRAWN)
        return tab

    yield call
    for tab in tabs:
        tab.run("1")
        assert tab.logged == []
        assert [url for url in tab.requested if not url.startswith("file:")] == []
        assert len(tab.requested) == 1, tab.requested
        assert tab.dialogs == []
        tab.close()


def number(tab: Tab, name: str) -> float:
    return float(tab.run(f"document.getElementById('{name}').value"))


def text(tab: Tab, selector: str) -> str:
    return str(tab.run(f"document.querySelector({json.dumps(selector)}).textContent"))


def ask(tab: Tab, budget: str) -> None:
    """Type a budget."""
    tab.run(
        f"""(() => {{
          const field = document.getElementById('budget');
          field.value = {json.dumps(budget)};
          field.dispatchEvent(new Event('input'));
        }})()"""
    )


def table_column(tab: Tab, column: str) -> dict[str, str]:
    """Text of a column of the table of tensors, by full name."""
    heads = tab.run("[...document.querySelectorAll('#tensors th')].map((head) => head.textContent)")
    cells = tab.run(
        "[...document.querySelectorAll('#tensors tbody tr')].map((row) => [row.cells[0].title, "
        f"row.cells[{heads.index(column)}].textContent])"
    )
    return dict(cells)


def test_charts_are_drawn(show: Open, data: dict[str, Any]) -> None:
    tab = show(data)
    for chart, marks in {"pareto": 1, "map": 29, "spectrum": 48, "energy": 1}.items():
        drawn = tab.run(f"document.querySelectorAll('#{chart} svg .role-mark path').length")
        assert drawn >= marks, chart
    labels = "[...document.querySelectorAll('#map svg .role-axis-label text')].map((label) => label.textContent)"
    assert tab.run(labels)[:4] == ["0", "1", "2", "3"]
    assert number(tab, "total-bytes") == data["totals"]["bytes"]
    assert number(tab, "total-error") == pytest.approx(data["totals"]["error"], abs=1e-9)
    assert number(tab, "largest-rank") == max(tensor.get("rank", 0) for tensor in data["tensors"])
    assert len(table_column(tab, "rank")) == len(data["tensors"])
    assert "--rank auto" in text(tab, "#command")
    for metric in ("error", "relative", "noise", "rank"):
        tab.run(f"document.querySelector('#metrics input[value={metric}]').click()")
    tab.wait("document.querySelectorAll('#map svg .mark-rect.role-mark path').length === 29")


CHOICES: dict[str, dict[str, Any]] = {
    "auto": {},
    "multiples of 8": {"ranks_allowed": "8x"},
    "a list and a cap": {"ranks_allowed": "vllm", "max_rank": 20},
    "other weights": {"rank": "energy=0.5", "weights": "relative"},
    "one rank": {"layout": "uniform", "ranks_allowed": "2x"},
}


@pytest.mark.parametrize("name", CHOICES)
def test_a_budget_gives_the_ranks_that_python_gives(show: Open, planned: Plan, name: str) -> None:
    asked = CHOICES[name]
    chosen = planned.choose(choose(**asked))
    tab = show(file.to_json(chosen))
    limits = {key: value for key, value in asked.items() if key != "rank"}
    for budget in BUDGETS:
        try:
            expected = planned.choose(choose(budget=budget, **limits))
        except lora_compress.errors.SelectionError:
            ask(tab, budget)
            assert "less than" in text(tab, "#state")
            continue
        ask(tab, budget)
        assert number(tab, "total-bytes") == expected.nbytes, budget
        assert number(tab, "total-error") == pytest.approx(expected.error, abs=1e-6), budget
        ranks = table_column(tab, "rank")
        assert {tensor: int(ranks[tensor]) for tensor in expected.ranks} == expected.ranks
        arguments = shlex.split(text(tab, "#command"))
        assert arguments[:4] == ["lora-compress", "extract", planned.base, planned.tuned]
        assert arguments[arguments.index("--budget") + 1] == budget.replace(" ", "")
        for flag, key in {"--weights": "weights", "--max-rank": "max_rank", "--layout": "layout"}.items():
            assert (flag in arguments) == (key in limits)


def test_a_plan_of_gradients_has_nothing_to_extract(
    show: Open,
    data: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What `lora_compress.torch.suggest` saves."""
    gradients = {**data, "options": {"spectra": "gradients", "batches": 8, "seed": 3, "scale": "rslora", "alpha": 16.0}}
    gradients["base"] = "LlamaForCausalLM"
    tab = show(gradients)
    assert text(tab, "#recognised").startswith("Ranks to train with")
    ask(tab, "64kB")
    assert "extract" not in text(tab, "#state")
    # The command that is shown is taken.
    monkeypatch.chdir(tmp_path)
    Path("plan.json").write_text(json.dumps(gradients))
    assert recognise(file.read(Path("plan.json"))).warnings == ()
    command = shlex.split(text(tab, "#command"))
    assert command == ["lora-compress", "plan", "plan.json", "-o", "ranks.json", "--budget", "64kB"]
    assert cli._run(command[1:]) == 0
    assert file.read(Path("ranks.json")).file_bytes <= 64_000
    printed = capsys.readouterr().out
    assert "ranks to train with" in printed
    assert "extraction" not in printed
    assert cli._run(["plan", "plan.json", "--rank", "4000"]) != 0
    assert "call `suggest` again" in capsys.readouterr().err


def test_the_slider_moves_everything_and_the_plan_comes_back(show: Open, planned: Plan, data: dict[str, Any]) -> None:
    tab = show(data)
    seen = set()
    for position in (0, 300, 640, 1000):
        tab.run(
            f"""(() => {{
              const slider = document.getElementById('slider');
              slider.value = {position};
              slider.dispatchEvent(new Event('input'));
              return new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
            }})()"""
        )
        budget = tab.run("document.getElementById('budget').value")
        expected = planned.choose(choose(budget=budget))
        assert number(tab, "total-bytes") == expected.nbytes
        assert number(tab, "total-error") == pytest.approx(expected.error, abs=1e-6)
        seen.add(expected.nbytes)
    assert len(seen) == 4
    tab.run("document.getElementById('reset').click()")
    assert number(tab, "total-bytes") == planned.nbytes
    assert "--budget" not in text(tab, "#command")


def test_what_is_no_budget_is_refused_and_changes_nothing(show: Open, data: dict[str, Any]) -> None:
    tab = show(data)
    for refused in ("", "lots", "-3MB", "1e6", "12", "1iB"):
        ask(tab, refused)
        assert tab.run("document.getElementById('budget').getAttribute('aria-invalid')") == "true", refused
        assert number(tab, "total-bytes") == data["totals"]["bytes"]


def test_a_tensor_can_be_picked_in_the_map_and_in_the_table(show: Open, data: dict[str, Any]) -> None:
    tab = show(data)
    name = "model.layers.2.self_attn.k_proj.weight"
    tab.run(f"document.querySelector('#tensors td[title=\"{name}\"] button').click()")
    assert text(tab, "#tensor option:checked") == name
    # Vega listens to pointer events on its view, so the click is a real one.
    place = tab.run(
        """(() => {
          document.getElementById('map').scrollIntoView({ block: 'center', behavior: 'instant' });
          const box = document.querySelector('#map svg .mark-rect.role-mark path').getBoundingClientRect();
          return [box.x + box.width / 2, box.y + box.height / 2];
        })()"""
    )
    for kind in ("mousePressed", "mouseReleased"):
        tab.send("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1)
    tab.wait(f"document.querySelector('#tensor option:checked').textContent !== '{name}'")


def test_the_table_sorts_and_filters(show: Open, data: dict[str, Any]) -> None:
    tab = show(data)
    tab.run("[...document.querySelectorAll('#tensors th button')].find((head) => head.textContent === 'rank').click()")
    ranks = [int(rank) for rank in table_column(tab, "rank").values() if rank]
    assert ranks == sorted(ranks, reverse=True)
    tab.run(
        "(() => { const field = document.getElementById('filter'); field.value = 'K_PROJ';"
        "field.dispatchEvent(new Event('input')); })()"
    )
    assert len(table_column(tab, "rank")) == 4
    assert text(tab, "#count") == "4 of 38 tensors"


def test_dark_and_narrow(show: Open, data: dict[str, Any]) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    light = show(data).run(background)
    tab = show(hostile(data), width=360, height=740, dark=True)
    assert tab.run(background) != light
    assert tab.run("document.documentElement.scrollWidth") <= 360
    assert (
        tab.run("Math.max(...[...document.querySelectorAll('svg')].map((svg) => svg.getBoundingClientRect().right))")
        <= 360
    )
    tab.run("document.getElementById('theme').click()")
    tab.wait(f"{background} === '{light}'")


def test_hostile_names_are_shown_as_text(show: Open, data: dict[str, Any]) -> None:
    tab = show(hostile(data))
    titles = table_column(tab, "treatment")
    for name in HOSTILE[:3]:
        assert name in titles
        assert name in text(tab, "#warnings")
    for hidden in ("\u2028", "\u2029", "\u202e", "\0"):
        assert hidden not in tab.run("document.getElementById('report').textContent")
    assert r"model.layers.2.\u202etxt.exe" in titles
    assert tab.run("document.querySelectorAll('img, svg[onload], main script').length") == 0
    for index in range(len(HOSTILE)):
        tab.run(
            f"""(() => {{
              const picker = document.getElementById('tensor');
              picker.value = {index};
              picker.dispatchEvent(new Event('change'));
            }})()"""
        )
    # As a shell would read it: shlex does not know $'…'.
    command = text(tab, "#command").replace("lora-compress", "printf '%s\\0'", 1)
    run_in = ["bash", "-c", command]
    shell = subprocess.run(run_in, capture_output=True, check=True, env={"LC_ALL": "C.UTF-8"})
    words = shell.stdout.decode().split("\0")
    assert words[1:3] == [HOSTILE[0]] * 2
    assert [f"--exclude={name}" for name in (HOSTILE[1], HOSTILE[4], SHELL)] == words[-4:-1]


def test_a_plan_without_low_rank_tensors_is_a_page_too(show: Open, data: dict[str, Any]) -> None:
    few = copy.deepcopy(data)
    few["tensors"] = [tensor for tensor in few["tensors"] if "sigma" not in tensor]
    tab = show(few)
    assert number(tab, "largest-rank") == 0
    assert "exact tensors only" in text(tab, "#recognised")
