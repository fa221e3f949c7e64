"""One page that shows a run: no script, no style sheet and no font from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from itertools import chain

from loadtest.record import RequestRecord
from loadtest.stats import LATENCIES, Distribution, Summary, percentile

__all__ = ["render"]

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 560, 260, 64, 36, 12
_COLOURS = ("#0b6e99", "#c4552d", "#4d7c3a", "#7b4fa3")
_COLUMNS = ("mean", "p50", "p90", "p95", "p99", "max")
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1180px;margin:2rem auto;padding:0 1rem;color:#1c2733}
table{border-collapse:collapse;margin:.5rem 0 1.5rem}td,th{padding:.2rem .8rem;text-align:right;
border-bottom:1px solid #dde3e9}td:first-child,th:first-child{text-align:left}
.charts{display:flex;flex-wrap:wrap;gap:1.5rem}figure{margin:0}figcaption{font-weight:600}
svg text{font-size:11px;fill:#51606e}.error{color:#a8261b}
"""

_Values = Callable[[Sequence[RequestRecord]], list[float]]
_CURVES: dict[str, _Values] = {
    "ttft": lambda records: [record.ttft_s for record in records if record.ttft_s is not None],
    "tpot": lambda records: [record.tpot_s for record in records if record.tpot_s is not None],
    "itl": lambda records: list(chain.from_iterable(record.gaps_s for record in records)),
    "e2e": lambda records: [record.e2e_s for record in records],
}


def render(
    records: Mapping[str, Sequence[RequestRecord]], summaries: Mapping[str, Summary], facts: Mapping[str, object]
) -> str:
    """The page, from the records and summaries of each door and what there is to say about the run."""
    good = {door: [record for record in run if not record.error] for door, run in records.items()}
    charts = [
        _figure(f"{LATENCIES[name]} (ms) by percentile", _percentile_chart({d: values(r) for d, r in good.items()}))
        for name, values in _CURVES.items()
    ]
    charts.append(_figure("time to first token (ms) by send time (s)", _timeline(good)))
    about = "".join(f"<tr><td>{escape(key)}</td><td>{escape(str(value))}</td></tr>" for key, value in facts.items())
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Shoal load test</title>'
        f"<style>{_STYLE}</style><h1>Load test</h1><table>{about}</table>{_legend(list(records))}"
        f'<div class="charts">{"".join(charts)}</div>'
        + "".join(_table(door, summary) for door, summary in summaries.items())
        + "</html>\n"
    )


def _table(door: str, summary: Summary) -> str:
    head = "".join(f"<th>{column}</th>" for column in _COLUMNS)
    rows = "".join(
        f"<tr><td>{words} (ms)</td>{_cells(getattr(summary, name))}</tr>" for name, words in LATENCIES.items()
    )
    errors = "".join(f'<p class="error">{count} x {escape(message)}</p>' for message, count in summary.errors)
    return (
        f"<h2>{escape(door)}</h2><p>{summary.num_requests} requests, {summary.num_errors} errors, "
        f"{summary.requests_per_s:.2f} requests/s, {summary.output_tokens_per_s:.1f} output tokens/s</p>"
        f"{errors}<table><tr><th></th>{head}</tr>{rows}</table>"
    )


def _cells(distribution: Distribution | None) -> str:
    if distribution is None:
        return "<td>-</td>" * len(_COLUMNS)
    return "".join(f"<td>{getattr(distribution, column) * 1e3:.1f}</td>" for column in _COLUMNS)


def _legend(doors: Sequence[str]) -> str:
    return "<p>" + " ".join(f'<b style="color:{_colour(i)}">{escape(d)}</b>' for i, d in enumerate(doors)) + "</p>"


def _colour(index: int) -> str:
    return _COLOURS[index % len(_COLOURS)]


def _figure(caption: str, svg: str) -> str:
    return f"<figure><figcaption>{caption}</figcaption>{svg}</figure>"


def _percentile_chart(values: Mapping[str, Sequence[float]]) -> str:
    """Latency against percentile, one curve a door; its right end is the worst request."""
    top_ms = max((max(run) * 1e3 for run in values.values() if run), default=0.0)
    curves = []
    for index, run in enumerate(values.values()):
        if ordered := sorted(run):
            points = [(percent, percentile(ordered, percent) * 1e3) for percent in range(101)]
            path = " ".join(f"{_x(percent, 100):.1f},{_y(ms, top_ms):.1f}" for percent, ms in points)
            curves.append(f'<polyline points="{path}" fill="none" stroke="{_colour(index)}" stroke-width="2"/>')
    return _svg(_axes(100, top_ms) + "".join(curves))


def _timeline(records: Mapping[str, Sequence[RequestRecord]]) -> str:
    """Each request a dot, so that a stall shows as a slope: those meant to be sent in it waited for its end."""
    dots: list[tuple[int, float, float]] = []
    for index, run in enumerate(records.values()):
        start_s = min((record.intended_s for record in run), default=0.0)
        dots.extend((index, r.intended_s - start_s, r.ttft_s * 1e3) for r in run if r.ttft_s is not None)
    right_s = max((at_s for _, at_s, _ in dots), default=0.0)
    top_ms = max((ms for _, _, ms in dots), default=0.0)
    circles = "".join(
        f'<circle cx="{_x(at_s, right_s):.1f}" cy="{_y(ms, top_ms):.1f}" r="3" fill="{_colour(index)}" opacity=".7"/>'
        for index, at_s, ms in dots
    )
    return _svg(_axes(right_s, top_ms) + circles)


def _svg(body: str) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}" role="img">{body}</svg>'


def _x(value: float, most: float) -> float:
    return _LEFT + (_WIDTH - _LEFT - 16) * (value / most if most else 0.0)


def _y(value: float, most: float) -> float:
    return _HEIGHT - _BOTTOM - (_HEIGHT - _BOTTOM - _TOP) * (value / most if most else 0.0)


def _axes(right: float, top: float) -> str:
    lines = []
    for tick in _ticks(top):
        y = _y(tick, top)
        lines.append(f'<line x1="{_LEFT}" x2="{_WIDTH - 16}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e6ebf0"/>')
        lines.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in _ticks(right):
        x = _x(tick, right)
        lines.append(f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{tick:g}</text>')
    return "".join(lines)


def _ticks(most: float) -> list[float]:
    """Round numbers from zero, at most six."""
    if most <= 0:
        return [0.0]
    magnitude = 10.0 ** math.floor(math.log10(most / 5))
    step = next(magnitude * factor for factor in (1, 2, 5, 10) if most / (magnitude * factor) <= 5)
    return [round(index * step, 10) for index in range(math.floor(most / step) + 1)]
