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

# In this order: each uses what stands before it.
SCRIPTS = ("words.js", "allocate.js", "plan.js", "tensor.js", "charts.js", "heatmap.js", "table.js", "page.js")
# Characters that could end a script element, or open a comment in one. JSON escapes all that is not ASCII by itself.
ESCAPES = {ord(character): f"\\u{ord(character):04x}" for character in "<>&"}


def page(plan_json: Mapping[str, Any]) -> str:
    """One self-contained HTML document from the JSON object of a plan (`lora_compress.ranks.file.to_json`).

    The same object gives the same bytes.
    """
    vega, script = _vega(), _script()
    parts = {
        "policy": _policy(vega, script),
        "title": html.escape(f"{_visible(_last(plan_json['tuned']))} – lora-compress plan"),
        "style": _asset("assets", "page.css"),
        "noscript": _without_scripts(plan_json),
        "data": json.dumps(plan_json, allow_nan=False, separators=(",", ":")).translate(ESCAPES),
        "vega": vega,
        "script": script,
    }
    # One pass, so that nothing put in is searched for more to put in.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _asset("assets", "page.html"))


def notebook(plan_json: Mapping[str, Any], *, height: int = 900) -> str:
    """The page as an `<iframe>` for notebooks, which keeps its styles and scripts from those of the notebook."""
    return (
        f'<iframe srcdoc="{html.escape(page(plan_json))}" title="lora-compress plan" width="100%" height="{height}" '
        'style="border:0" sandbox="allow-scripts" allow="clipboard-write" loading="lazy"></iframe>'
    )


def _policy(*scripts: str) -> str:
    hashes = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{value}'" for value in hashes)
    # Vega sets the styles of its elements inline.
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def _without_scripts(plan_json: Mapping[str, Any]) -> str:
    """What can be said without scripts: the plan's totals and warnings."""
    totals = plan_json["totals"]
    lines = [
        "This report draws its charts and tables with JavaScript, which is switched off.",
        f"Base: {plan_json['base']}",
        f"Tuned: {plan_json['tuned']}",
        f"The plan: an adapter of {totals['bytes']:,} bytes with a relative error of {totals['error']:.4f}.",
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
