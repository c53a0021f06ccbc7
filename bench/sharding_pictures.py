"""Draws docs/images/sharding-*.svg: which device holds which part, by the very rules in use.

    python bench/sharding_pictures.py

One picture for each preset of rules, on a mesh of eight virtual CPU devices.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

from pathlib import Path

import jax

from meshlm.core.sharding import RULES, MeshConfig, make_mesh, sharding_of, use_rules

IMAGES = Path(__file__).parents[1] / "docs" / "images"
SIZE, GAP, TOP = 176, 40, 62
# What is drawn: a title and the logical dims.
ARRAYS = (
    ("batch (rows x tokens)", ("batch", None)),
    ("feed-forward weight (F x D), as stored", ("ff", "embed")),
    ("embedding table (V x D), as stored", (None, "table_embed")),
)
COLOURS = ("#cfe3f7", "#f9dcc4", "#d3ecd0", "#ead7f0", "#fbeeb8", "#d5eef0", "#f4cfd4", "#dedbd2")


def parts_of(name: str, dims: tuple[str | None, ...]) -> dict[tuple, list[int]]:
    """Returns the devices that hold each part, a part being (top, bottom, left, right) of 8."""
    mesh = make_mesh(MeshConfig(replica=2, data=2, model=2))
    with use_rules(RULES[name]):
        sharding = sharding_of(mesh, *dims)
    held: dict[tuple, list[int]] = {}
    for device, (rows, columns) in sharding.devices_indices_map((8, 8)).items():
        part = (rows.start or 0, rows.stop or 8, columns.start or 0, columns.stop or 8)
        held.setdefault(part, []).append(device.id)
    return held


def draw(name: str) -> str:
    """Returns the picture of one preset."""
    width = GAP + len(ARRAYS) * (SIZE + GAP)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {TOP + SIZE + 24}" '
        f'font-family="sans-serif" role="img" aria-label="What each of 8 devices holds: {name}">',
        f'<rect width="{width}" height="{TOP + SIZE + 24}" fill="#ffffff"/>',
        f'<text x="{GAP}" y="24" font-size="15" font-weight="bold" fill="#222">{name} on a mesh '
        "of replica 2 x data 2 x model 2</text>",
    ]
    for i, (title, dims) in enumerate(ARRAYS):
        left = GAP + i * (SIZE + GAP)
        lines.append(f'<text x="{left}" y="{TOP - 10}" font-size="11" fill="#333">{title}</text>')
        for (top, bottom, first, last), devices in sorted(parts_of(name, dims).items()):
            lines += _box(left, (top, bottom, first, last), sorted(devices))
    return "\n".join([*lines, "</svg>", ""])


def _box(left: int, part: tuple[int, int, int, int], devices: list[int]) -> list[str]:
    top, bottom, first, last = (SIZE * edge // 8 for edge in part)
    x, y, width, height = left + first, TOP + top, last - first, bottom - top
    colour = COLOURS[devices[0]] if len(devices) < 8 else "#eeeeee"
    text = " ".join(map(str, devices))
    turned = len(text) * 6 > width > 0 and height > width
    at = f'x="{x + width / 2:g}" y="{y + height / 2 + 4:g}"'
    turn = f' transform="rotate(-90 {x + width / 2:g} {y + height / 2:g})"' if turned else ""
    return [
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="{colour}" '
        'stroke="#555" stroke-width="1"/>',
        f'<text {at} font-size="11" text-anchor="middle" fill="#222"{turn}>{text}</text>',
    ]


def main() -> None:
    """Writes the pictures."""
    assert len(jax.devices()) == 8
    for name in RULES:
        (IMAGES / f"sharding-{name}.svg").write_text(draw(name))


if __name__ == "__main__":
    main()
