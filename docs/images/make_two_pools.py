"""Draws two-pools.svg: the two pools and the path of a request.

Run it after a change: python docs/images/make_two_pools.py
"""

from __future__ import annotations

from pathlib import Path

WIDTH, HEIGHT = 960, 600
INK, FAINT, PAPER, PANEL, FREE = "#1f2430", "#5b6375", "#fcfcfa", "#f0f1ee", "#dcdfe4"
MODELS = {"model A": "#3b6fb6", "model B": "#c2672d", "model C": "#3f8f5f"}
PAGES = "AAB.CACA.BBA.AC..AAACB.A.BACA..C.AB.A"


def text(x: float, y: float, words: str, size: int = 14, colour: str = INK, **more: str) -> str:
    attributes = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in more.items())
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}"{attributes}>{words}</text>'


def box(
    x: float, y: float, width: float, height: float, fill: str, stroke: str = "none", radius: int = 8
) -> str:
    place = f'x="{x}" y="{y}" width="{width}" height="{height}" rx="{radius}"'
    return f'<rect {place} fill="{fill}" stroke="{stroke}"/>'


def arrow(path: str) -> str:
    return f'<path d="{path}" fill="none" stroke="{INK}" stroke-width="1.8" marker-end="url(#head)"/>'


def step(x: float, y: float, number: int) -> str:
    circle = f'<circle cx="{x}" cy="{y}" r="11" fill="{INK}"/>'
    return circle + text(x, y + 4.5, str(number), 13, PAPER, text_anchor="middle", font_weight="bold")


def front() -> list[str]:
    """The API process and the engine's control plane, above the pools."""
    return [
        box(24, 24, 150, 64, PANEL, FAINT),
        text(99, 52, "clients", 15, text_anchor="middle", font_weight="bold"),
        text(99, 72, "OpenAI API", 12, FAINT, text_anchor="middle"),
        arrow("M174 56 H 232"),
        step(203, 36, 1),
        box(236, 24, 300, 64, PANEL, FAINT),
        text(386, 50, "API process", 15, text_anchor="middle", font_weight="bold"),
        text(386, 71, "HTTP, chat template, tokens in, text out", 12, FAINT, text_anchor="middle"),
        arrow("M536 56 H 594"),
        step(565, 36, 2),
        box(598, 24, 338, 64, PANEL, FAINT),
        text(767, 50, "engine: scheduler", 15, text_anchor="middle", font_weight="bold"),
        text(767, 71, "a queue for each model; micro-batches, pages", 12, FAINT, text_anchor="middle"),
    ]


def kv_pool(x: float, y: float) -> list[str]:
    """Equal pages, each lent to some model or free."""
    side, gap, columns = 30, 7, 10
    parts = [
        box(x, y, 410, 330, PANEL, FAINT),
        text(x + 20, y + 32, "KV pool", 18, font_weight="bold"),
        text(x + 20, y + 54, "equal pages; any page to any model, at once", 13, FAINT),
    ]
    for index, owner in enumerate(PAGES.ljust(40, ".")):
        colour = FREE if owner == "." else MODELS[f"model {owner}"]
        row, column = divmod(index, columns)
        parts.append(
            box(x + 20 + column * (side + gap), y + 72 + row * (side + gap), side, side, colour, radius=4)
        )
    return [
        *parts,
        box(x + 20, y + 236, 370, 74, PAPER, FAINT),
        text(x + 36, y + 262, "attention side", 15, font_weight="bold"),
        text(x + 36, y + 282, "embeddings, attention over the pages, LM head,", 12, FAINT),
        text(x + 36, y + 298, "choice of the next token", 12, FAINT),
    ]


def weights_pool(x: float, y: float) -> list[str]:
    """The FFN weights of every model: a row of layers each, a layer being some experts."""
    parts = [
        box(x, y, 410, 330, PANEL, FAINT),
        text(x + 20, y + 32, "weights pool", 18, font_weight="bold"),
        text(x + 20, y + 54, "FFN weights (experts) of all models, in one budget", 13, FAINT),
    ]
    for row, (name, experts) in enumerate((("model A", 8), ("model B", 4), ("model C", 6))):
        top = y + 72 + row * 50
        parts.append(text(x + 20, top + 26, name, 13, MODELS[name], font_weight="bold"))
        width = 296 / experts
        parts += [
            box(x + 94 + expert * width, top, width - 5, 40, MODELS[name], radius=4)
            for expert in range(experts)
        ]
    return [
        *parts,
        box(x + 20, y + 236, 370, 74, PAPER, FAINT),
        text(x + 36, y + 262, "FFN side", 15, font_weight="bold"),
        text(x + 36, y + 282, "router and experts of one layer of one model", 12, FAINT),
        text(x + 36, y + 298, "at a time", 12, FAINT),
    ]


def paths() -> list[str]:
    """From the scheduler to the sides, between them, and back."""
    return [
        arrow("M 700 88 V 120 H 350 V 150"),
        step(525, 120, 3),
        arrow("M 434 408 H 522"),
        step(480, 388, 4),
        arrow("M 526 446 H 438"),
        step(480, 466, 5),
        arrow("M 60 154 V 120 H 280 V 92"),
        step(170, 120, 6),
    ]


def captions() -> list[str]:
    places = (
        (35, 518, 1, "a request comes in"),
        (255, 518, 2, "it waits in its model's queue"),
        (535, 518, 3, "it gets pages and joins a micro-batch"),
        (35, 548, 4, "for each layer, hidden states cross to the FFN side ..."),
        (535, 548, 5, "... and back; meanwhile others use the free side"),
        (35, 578, 6, "a token goes out; when the request ends, its pages are free for any model"),
    )
    return [part for x, y, n, words in places for part in (step(x, y, n), text(x + 20, y + 5, words))]


def draw() -> str:
    head = (
        '<defs><marker id="head" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="7" markerHeight="7" '
        f'orient="auto"><path d="M0 0 L10 5 L0 10 z" fill="{INK}"/></marker></defs>'
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}" font-family="Helvetica, Arial, sans-serif" role="img">',
        "<title>The two pools of CrossPool and the path of a request</title>",
        head,
        box(0, 0, WIDTH, HEIGHT, PAPER, radius=14),
        *front(),
        *kv_pool(24, 154),
        *weights_pool(526, 154),
        *paths(),
        *captions(),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("two-pools.svg").write_text(draw(), encoding="utf-8")
