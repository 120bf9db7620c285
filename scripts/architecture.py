# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""python scripts/architecture.py --output docs

Draws the pictures of ARCHITECTURE.md from the code: `files.png`, the code files and who imports whom, and
`forward.png`, one forward and one conversion as a walk with the names of what is called.

Imports are read from the sources. Each name of a walk must exist, and where its caller is given, occur there. What a
picture shows is also in its file, as JSON under the key `shown`. The last line printed is JSON.
"""

import argparse
import ast
import importlib
import inspect
import json
import textwrap
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
# that are one box each
FOLDERS = {"attnres_convert": "convert", "attnres_recipes": "scripts/recipes"}
FOLDERS |= {"scripts": "scripts", "benchmarks": "benchmarks"}
KERNELS = "attnres_kernels"

INK, LINE, PAPER = "#24292f", "#8c959f", "#ffffff"
BLUE, PALE_BLUE, SAND, GREY = "#d6e6f5", "#eaf2fa", "#f5ead6", "#eef0f2"
WIDTH = 10  # inches, of 100 pixels where GitHub shows them

# file or folder: (x, y) of its middle, width, what it has
PLACES = {
    "scripts": (2.1, 10.45, 3.8, "the commands"),
    "benchmarks": (7.2, 10.45, 5.2, "speed and memory, exactness, conformance, GPUs"),
    "attnres_recipes": (4.2, 9.25, 5.2, "training, evaluation, generation, figures, publishing"),
    "attnres_convert": (1.75, 7.85, 3.1, ""),
    "attnres": (7.05, 8.05, 5.5, "registers all of it with transformers and by name"),
    "families_attnres": (3.9, 5.35, 2.6, "the other families"),
    "modeling_attnres": (3.9, 3.8, 2.6, "model and heads, Llama"),
    "configuration_attnres": (1.9, 1.1, 2.9, "fields, arithmetic of blocks"),
    "depth_attention_attnres": (6.0, 1.1, 3.2, "operator, interface, queries"),
    "depth_mixers_attnres": (4.85, 2.45, 2.5, "the other modes"),
    "attnres_kernels.cpu": (6.35, 6.4, 1.1, "in C++"),
    "attnres_kernels.triton_kernels": (7.85, 6.4, 1.7, "for GPUs"),
    "attnres_kernels.peers": (9.3, 6.4, 1.0, "of others"),
    "attnres_kernels.fused": (6.9, 5.15, 1.9, "fused operators"),
}

CONVERSION, MODEL = "attnres_convert.conversion", "modeling_attnres.AttnResModelMixin"
INTERFACE = "depth_attention_attnres.DepthAttentionImplementation"
READ = "depth_attention_attnres.DepthRead.forward"
LAYER = "modeling_attnres.AttnResDecoderLayerMixin"
# A walk is a list of steps (what is called, by whom, what it does), and of groups (heading, steps).
FORWARD = [
    (f"{MODEL}.forward", None, "token embeddings, masks, positions"),
    (f"{MODEL}.embed", f"{MODEL}.forward", "the first source"),
    (f"{MODEL}.read_over_depth", f"{MODEL}.forward", "takes the products of DepthMixer.forward"),
    (f"{INTERFACE}.begin", f"{MODEL}.read_over_depth", "what all reads of the forward share"),
    (
        "for each block",
        [
            (f"{INTERFACE}.open_block", f"{MODEL}.open_block", "phase 1: closed sources, for all reads of the block"),
            (
                "for each layer",
                [
                    (f"{INTERFACE}.read", READ, "joined, phase 2, attention_norm"),
                    (f"{LAYER}.attend", f"{LAYER}.forward", "its output waits as the last source"),
                    (f"{INTERFACE}.read", READ, "joined, phase 2, mlp_norm"),
                    (f"{LAYER}.transform", f"{LAYER}.forward", "its output waits as the last source"),
                ],
            ),
        ],
    ),
    ("modeling_attnres.OutputRead.forward", None, "the last read, then the final norm"),
]
CONVERT = [
    (f"{CONVERSION}.convert_checkpoint", None, "or convert_to_donor, the way back"),
    (f"{CONVERSION}._opened", f"{CONVERSION}.convert_checkpoint", "of a GGUF file: its floats, in a hidden folder"),
    ("attnres_convert.source.open_source", f"{CONVERSION}._opened", "a folder or a Hub id: a Source"),
    (f"{CONVERSION}._plan_attnres", f"{CONVERSION}.convert_checkpoint", "all that is decided: a Plan"),
    (f"{CONVERSION}._check_space", f"{CONVERSION}.convert_checkpoint", "on the disk of the destination"),
    (
        "in a hidden folder: staging.staged",
        [
            ("attnres_convert.files.write_shards", f"{CONVERSION}._write_attnres", "weights, as bytes of files"),
            ("configuration_attnres.AttnResConfigMixin.hub_files", f"{CONVERSION}._write_attnres", "the code files"),
            ("attnres_convert.verification.verify", f"{CONVERSION}._verify", "runs both models, compares logits"),
            ("attnres_convert.card.write_card", f"{CONVERSION}._write_card", "model card, beside results.json"),
        ],
    ),
    ("attnres_convert.staging.staged", f"{CONVERSION}.convert_checkpoint", "ends: the folder gets its name"),
]


def boxes() -> dict[str, list[Path]]:
    """The files of each box; `setup.py`, which nobody imports, is none."""
    found = {path.stem: [path] for path in sorted(ROOT.glob("*.py")) if path.stem != "setup"}
    for path in sorted((ROOT / KERNELS).glob("*.py")):
        if path.stem != "__init__":
            found[f"{KERNELS}.{path.stem}"] = [path]
    return found | {name: sorted((ROOT / folder).glob("*.py")) for name, folder in FOLDERS.items()}


def imported(path: Path) -> set[str]:
    """The names of modules that a file may import; for `from a import b` both `a` and `a.b`."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update([node.module, *(f"{node.module}.{alias.name}" for alias in node.names)])
    return names


def import_graph() -> dict[str, list[str]]:
    """For each box, which others its files import."""
    files, graph = boxes(), {}
    for box, paths in files.items():
        names = set().union(*map(imported, paths))
        names |= {name.split(".")[0] for name in names if name.split(".")[0] in FOLDERS}
        if box in FOLDERS:  # a relative import is of a neighbour
            names -= {path.stem for path in paths if not (ROOT / path.name).exists()}
        graph[box] = sorted((names & files.keys()) - {box})
    return graph


def without_implied(graph: dict[str, list[str]]) -> dict[str, list[str]]:
    """The graph without imports that others lead to as well."""

    def reached(box: str) -> set[str]:
        return set(graph[box]).union(*(reached(other) for other in graph[box]))

    return {
        box: [one for one in others if not any(one in reached(other) for other in others if other != one)]
        for box, others in graph.items()
    }


def travelling() -> dict[str, list[str]]:
    """Which files a folder of Llama's has, and one of another family."""
    configuration = importlib.import_module("configuration_attnres")
    classes = {"llama": configuration.AttnResConfig, "others": configuration.AttnResMistralConfig}
    return {name: [path.stem for path in cls.hub_files()] for name, cls in classes.items()}


def shown_files() -> dict:
    return {
        "imports": import_graph(),
        "convert": [path.stem for path in boxes()["attnres_convert"] if path.stem != "__init__"],
        "travelling": travelling(),
    }


def look_up(name: str):
    """What a dotted name stands for.

    Raises:
        SystemExit: there is nothing of that name.
    """
    parts = name.split(".")
    for number in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:number]))
        except ModuleNotFoundError:
            continue
        for part in parts[number:]:
            found = getattr(found, part, None)
        if found is not None:
            return found
    raise SystemExit(f"error: {name}, which a walk names, is gone; correct the walks in {Path(__file__).name}.")


def check_walk(walk: list):
    """
    Raises:
        SystemExit: a name is gone, or isn't mentioned where it is said to be called.
    """
    for first, *rest in walk:
        if len(rest) == 1:
            check_walk(rest[0])
            continue
        look_up(first)
        caller, _ = rest
        called = first.rpartition(".")[2]
        if caller and called not in inspect.getsource(look_up(caller)):
            raise SystemExit(f"error: {caller} doesn't call {called}; correct the walks in {Path(__file__).name}.")


def shown_walks() -> dict:
    check_walk(FORWARD)
    check_walk(CONVERT)
    return json.loads(json.dumps({"forward": FORWARD, "conversion": CONVERT}))


def new_axes(height: float):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), dpi=160, facecolor=PAPER)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def draw_box(axes, left: float, bottom: float, width: float, height: float, color: str, edge: str = LINE, z: int = 2):
    from matplotlib.patches import FancyBboxPatch

    style = "round,pad=0,rounding_size=0.08"
    axes.add_patch(FancyBboxPatch((left, bottom), width, height, boxstyle=style, fc=color, ec=edge, lw=0.8, zorder=z))


def draw_text(axes, x: float, y: float, text: str, size: float = 9.5, **options):
    options = {"ha": "center", "va": "center", "color": INK, "zorder": 5, "linespacing": 1.35, **options}
    axes.text(x, y, text, fontsize=size, **options)


def draw_arrow(axes, start: tuple[float, float], end: tuple[float, float]):
    style = {"arrowstyle": "-|>", "color": LINE, "lw": 1.1, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 11}
    axes.annotate("", xy=end, xytext=start, arrowprops=style, zorder=3)


def draw_files(shown: dict):
    """
    Raises:
        SystemExit: a file has no place in the picture.
    """
    graph = shown["imports"]
    if unplaced := graph.keys() ^ PLACES.keys():
        raise SystemExit(f"error: {', '.join(sorted(unplaced))}: give it a place in {Path(__file__).name}, or take it.")
    figure, axes = new_axes(10.9)
    draw_box(axes, 0.2, 0.15, 7.65, 4.25, PAPER, z=0)
    draw_box(axes, 2.35, 4.4, 3.0, 1.95, PAPER, z=0)
    draw_box(axes, 5.6, 4.6, 4.3, 2.4, PAPER, z=0)
    draw_text(axes, 0.4, 0.38, "travel to the Hub with Llama", ha="left", style="italic")
    draw_text(axes, 2.55, 6.05, "one more with others", ha="left", style="italic")
    draw_text(axes, 9.75, 4.85, f"{KERNELS}/", ha="right", style="italic")

    half = dict.fromkeys(PLACES, 0.4) | {"attnres_convert": 0.75}
    for name, (x, y, width, note) in PLACES.items():
        travels = shown["travelling"]
        color = BLUE if name in travels["llama"] else PALE_BLUE if name in travels["others"] else GREY
        color = SAND if name.startswith(KERNELS) else color
        title = f"{FOLDERS[name]}/" if name in FOLDERS else f"{name.split('.')[-1]}.py"
        if name == "attnres_convert":
            note = textwrap.fill(", ".join(shown["convert"]), 38)
        draw_box(axes, x - width / 2, y - half[name], width, 2 * half[name], color)
        top = y + half[name]
        draw_text(axes, x, top - 0.31, title, family="monospace", weight="bold", va="baseline")
        draw_text(axes, x, top - 0.45, note, size=9, va="top")
    for name, others in without_implied(graph).items():
        x, y, width, _ = PLACES[name]
        for other in others:
            to_x, to_y, to_width, _ = PLACES[other]
            # as near to straight down as both boxes allow
            from_x = min(max(to_x, x - width / 2 + 0.3), x + width / 2 - 0.3)
            end_x = min(max(from_x, to_x - to_width / 2 + 0.3), to_x + to_width / 2 - 0.3)
            draw_arrow(axes, (from_x, y - half[name]), (end_x, to_y + half[other]))
    return figure


STEP, GAP, HEADING = 0.56, 0.2, 0.34


def height_of(walk: list) -> float:
    total = GAP * len(walk)
    for _, *rest in walk:
        total += STEP if len(rest) == 2 else HEADING + height_of(rest[0]) - GAP + 0.12
    return total


def draw_walk(axes, walk: list, left: float, top: float, width: float) -> float:
    """Draws steps from above to below; returns where they end."""
    middle = left + width / 2
    for number, (first, *rest) in enumerate(walk):
        if number:
            draw_arrow(axes, (middle, top + GAP), (middle, top))
        if len(rest) == 1:
            height = HEADING + height_of(rest[0]) - GAP + 0.12
            draw_box(axes, left, top - height, width, height, PAPER, z=0)
            draw_text(axes, left + 0.15, top - HEADING / 2 - 0.02, first, size=9, ha="left", style="italic")
            draw_walk(axes, rest[0], left + 0.15, top - HEADING, width - 0.3)
            top -= height + GAP
            continue
        _, note = rest
        is_read = first.startswith(INTERFACE) or first.endswith("OutputRead.forward")
        draw_box(axes, left, top - STEP, width, STEP, BLUE if is_read else GREY)
        # the class or module is in the walk; the method is what matters
        *_, owner, name = first.split(".")
        title = f"{owner}.{name}"
        draw_text(axes, middle, top - 0.225, title, size=9, family="monospace", weight="bold", va="baseline")
        draw_text(axes, middle, top - 0.445, note, size=9, va="baseline")
        top -= STEP + GAP
    return top


def draw_forward(shown: dict):
    height = max(map(height_of, shown.values())) - GAP + 0.72
    figure, axes = new_axes(height)
    for left, title, walk in ((0.2, "One forward", "forward"), (5.2, "One conversion", "conversion")):
        draw_text(axes, left, height - 0.27, title, size=12, weight="bold", ha="left")
        draw_walk(axes, shown[walk], left, height - 0.52, 4.6)
    return figure


PICTURES = {"files.png": (shown_files, draw_files), "forward.png": (shown_walks, draw_forward)}


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[1])
    parser.add_argument("--output", type=Path, default=ROOT / "docs", help="folder of the pictures")
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    for name, (look, draw) in PICTURES.items():
        shown = look()
        draw(shown).savefig(args.output / name, metadata={"shown": json.dumps(shown), "Software": None})
    print(json.dumps({"pictures": [str(args.output / name) for name in PICTURES]}))


if __name__ == "__main__":
    main()
