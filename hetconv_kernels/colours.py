# SPDX-License-Identifier: Apache-2.0
"""The colours of the report, by role, for a light and a dark page.

The hues are those of Okabe and Ito (Color Universal Design, 2008), which readers with any common
colour blindness tell apart; every family has a mark of its own shape besides, and vermilion is kept
for losses, which are always marked by a sign or a word too.
"""

from __future__ import annotations

# role -> (light, dark). No two roles share a light colour: figures are drawn in it, and the page
# replaces each by the role's CSS variable.
COLOURS = {
    "ink": ("#1c2127", "#e6e9ed"),
    "muted": ("#57606b", "#a3adb8"),
    "rule": ("#d7dce1", "#363d46"),
    "page": ("#fdfdfc", "#15191e"),
    "panel": ("#f4f5f3", "#1d2229"),
    "loss": ("#b8430a", "#ff9466"),
    "win": ("#00694d", "#4fd0a5"),
    "dense": ("#8b949e", "#7d8894"),
    "blue": ("#0072b2", "#5fb3ea"),
    "green": ("#009e73", "#3cc79b"),
    "purple": ("#b65f94", "#e5a0c8"),
    "sky": ("#3b9ad6", "#96d3f7"),
    "orange": ("#d18f00", "#f3bd52"),
}

# family of Supports -> (role, mark as matplotlib names it)
FAMILY_MARKS = {
    "HetConv": ("blue", "o"),
    "self-grouped": ("green", "s"),
    "grouped": ("purple", "^"),
    "learned groups": ("sky", "D"),
    "single weights": ("orange", "P"),
    "dense Support": ("dense", "X"),
    "other": ("muted", "v"),
}


def light(role: str) -> str:
    """Returns the colour of a role on a light page, as figures are drawn."""
    return COLOURS[role][0]


def css_variables() -> str:
    """Writes the colours as CSS: a light page, and a dark one where the reader prefers it."""

    def block(place: int) -> str:
        return " ".join(f"--{role}: {pair[place]};" for role, pair in COLOURS.items())

    return (
        f":root {{ color-scheme: light dark; {block(0)} }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ {block(1)} }} }}\n"
    )


def themed(svg: str) -> str:
    """Replaces the colours of a figure by CSS variables, so that it follows the page."""
    for role, (colour, _) in COLOURS.items():
        svg = svg.replace(colour, f"var(--{role})")
    return svg
