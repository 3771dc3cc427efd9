"""The page itself: assets and data put together into one document.

Nothing of the plan becomes markup. It travels as JSON whose `<`, `>` and `&` are escapes, and the page's scripts write
it as text. The content security policy names the two scripts by their hashes, so no other could run, and allows no
request at all.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

from lora_compress.report import comparison

# In this order: each uses what stands before it.
SCRIPTS = (
    "words.js",
    "allocate.js",
    "plan.js",
    "tensor.js",
    "charts.js",
    "heatmap.js",
    "table.js",
    "comparison.js",
    "decompositions.js",
    "page.js",
)
# Characters that could end a script element, or open a comment in one. JSON escapes all that is not ASCII by itself.
ESCAPES = {ord(character): f"\\u{ord(character):04x}" for character in "<>&"}


def page(plan_json: Mapping[str, Any], comparison_json: Mapping[str, Any] | None = None) -> str:
    """One self-contained HTML document from the JSON object of a plan (`lora_compress.ranks.file.to_json`).

    With that of a comparison (`CompareResult.to_json`) it has a section on decompositions too; `PlanError` is raised
    when that is malformed or of other models. The same objects give the same bytes.
    """
    vega, script = _vega(), _script()
    compared = None if comparison_json is None else comparison.checked(comparison_json)
    if compared is not None:
        comparison.match(compared, plan_json["base"], plan_json["tuned"], plan_json["tensors"])
    parts = {
        "policy": _policy(vega, script),
        "title": html.escape(f"{_visible(_last(plan_json['tuned']))} – lora-compress plan"),
        "style": _asset("assets", "page.css"),
        "noscript": _without_scripts(plan_json, compared),
        "decompositions": "" if compared is None else _asset("assets", "decompositions.html"),
        "data": _island("plan", plan_json),
        "comparison": "" if compared is None else _island("comparison", comparison.compact(compared)),
        "vega": vega,
        "script": script,
    }
    # One pass, so that nothing put in is searched for more to put in.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _asset("assets", "page.html"))


def notebook(
    plan_json: Mapping[str, Any], comparison_json: Mapping[str, Any] | None = None, *, height: int = 900
) -> str:
    """The page as an `<iframe>` for notebooks, which keeps its styles and scripts from those of the notebook."""
    document = html.escape(page(plan_json, comparison_json))
    return (
        f'<iframe srcdoc="{document}" title="lora-compress plan" width="100%" height="{height}" '
        'style="border:0" sandbox="allow-scripts" allow="clipboard-write" loading="lazy"></iframe>'
    )


def _policy(*scripts: str) -> str:
    hashes = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{value}'" for value in hashes)
    # Vega sets the styles of its elements inline.
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def _island(name: str, data: Mapping[str, Any]) -> str:
    """An element that carries data and is never run."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).translate(ESCAPES)
    return f'<script type="application/json" id="{name}">{text}</script>\n'


def _without_scripts(plan_json: Mapping[str, Any], compared: Mapping[str, Any] | None) -> str:
    """What can be said without scripts: the totals of the plan and of a comparison, and warnings."""
    totals = plan_json["totals"]
    lines = [
        "This report draws its charts and tables with JavaScript, which is switched off.",
        f"Base: {plan_json['base']}",
        f"Tuned: {plan_json['tuned']}",
        f"The plan: an adapter of {totals['bytes']:,} bytes with a relative error of {totals['error']:.4f}.",
        *([] if compared is None else comparison.summary(compared)),
        *plan_json["warnings"],
    ]
    return "".join(f"<p>{html.escape(_visible(line))}</p>" for line in lines)


def _visible(text: str) -> str:
    """Text whose control, direction and other unseen characters are written as escapes."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


def _last(path: str) -> str:
    """The last two parts of a path: models of one project often end alike."""
    return "/".join(path.rstrip("/").split("/")[-2:]) or path


@cache
def _script() -> str:
    """The page's own scripts in a scope of their own."""
    return '(() => {\n"use strict";\n' + "\n".join(_asset("assets", name) for name in SCRIPTS) + "})();\n"


@cache
def _vega() -> str:
    return _asset("vendor", "vega.min.js")


def _asset(folder: str, name: str) -> str:
    return (resources.files("lora_compress.report") / folder / name).read_text(encoding="utf-8")
