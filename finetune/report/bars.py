"""A bar chart as inline SVG: two bars for each part, and how much the second differs from the first."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT, LEFT, TOP, BASE = 720, 240, 52, 40, 206  # of the picture and, inside it, of the axes


def pairs_of_bars(title: str, names: Sequence[str], first: Sequence[float], second: Sequence[float]) -> str:
    """Returns bars of two rows of values, none below 0, beside each other for each name, from 0 up.

    Above each pair is the change from the first to the second, in percent.
    """
    high = max([*first, *second, 1e-12])
    slot = (WIDTH - LEFT - 8) / len(names)
    drawn = "".join(
        _pair(LEFT + index * slot, slot, (one / high, other / high), name)
        for index, (name, one, other) in enumerate(zip(names, first, second, strict=True))
    )
    spoken = "; ".join(
        f"{name}: {one:.3g} and {other:.3g}" for name, one, other in zip(names, first, second, strict=True)
    )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img" style="min-width:560px" '
        f'aria-label="{escape(title)} before and after, {escape(spoken)}">'
        f'<line x1="{LEFT}" y1="{BASE}" x2="{WIDTH - 8}" y2="{BASE}" stroke="var(--line)"/>'
        f'<g fill="var(--soft)" font-size="12"><text x="{LEFT}" y="14">{escape(title)}</text>'
        f'<text x="{LEFT - 8}" y="{TOP + 10}" text-anchor="end">{high:.3g}</text>'
        f'<text x="{LEFT - 8}" y="{BASE}" text-anchor="end">0</text></g>{drawn}</svg>'
    )


def _pair(left: float, slot: float, values: tuple[float, float], name: str) -> str:
    """Two bars and their labels; `values` are shares of the tallest bar."""
    heights = [value * (BASE - TOP) for value in values]
    wide, middle = 0.36 * slot, left + slot / 2
    change = values[1] / values[0] - 1 if values[0] else 0.0
    colour = "var(--good)" if change < 0 else "var(--bad)"
    return (
        f'<rect x="{middle - wide:.1f}" y="{BASE - heights[0]:.1f}" width="{wide:.1f}" height="{heights[0]:.1f}" '
        f'fill="var(--soft)" opacity=".55"/>'
        f'<rect x="{middle:.1f}" y="{BASE - heights[1]:.1f}" width="{wide:.1f}" height="{heights[1]:.1f}" '
        f'fill="var(--mark)"/>'
        f'<text x="{middle:.1f}" y="{BASE - max(heights) - 5:.1f}" font-size="12" text-anchor="middle" '
        f'fill="{colour}">{100 * change:+.0f}%</text>'
        f'<text x="{middle:.1f}" y="{BASE + 18}" font-size="11" text-anchor="middle" fill="var(--soft)">'
        f"{escape(name)}</text>"
    )
