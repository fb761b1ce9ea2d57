"""Permutation groups of other libraries' networks: a table for docs/symmetries.md, one row per network.

    python tools/symmetry_table.py                    all that are installed, as a table
    python tools/symmetry_table.py resnet50 gpt2      some of them
    python tools/symmetry_table.py --write            the table between the marks in docs/symmetries.md

Networks are built without weights. Seconds are of this machine, tracing and proof apart; the table says which.
"""

from __future__ import annotations

import argparse
import platform
import re
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastar.errors import FastarError
from fastar.symmetry import derive_symmetry, verify_symmetry

DOCS = Path(__file__).resolve().parent.parent / "docs" / "symmetries.md"
BEGIN, END = "<!-- table: python tools/symmetry_table.py --write -->", "<!-- end of table -->"

Made = tuple[nn.Module, Any]


def _torchvision(name: str, size: int) -> Made:
    import_torchvision()
    import torchvision

    return getattr(torchvision.models, name)(weights=None), (torch.zeros(2, 3, size, size),)


def _timm(name: str, size: int) -> Made:
    import_torchvision()
    import timm

    return timm.create_model(name, pretrained=False), (torch.zeros(2, 3, size, size),)


def _transformers(kind: str, head: str, **config: Any) -> Made:
    import_torchvision()
    import transformers

    config_class = getattr(transformers, f"{kind}Config")
    model = getattr(transformers, head)(config_class(vocab_size=50, bos_token_id=0, eos_token_id=0, **config))
    # The cache of keys and values would be an output, whose heads may not move.
    return model, {"input_ids": torch.zeros(2, 8, dtype=torch.long), "use_cache": False}


_PICTURES = (
    "resnet18 resnet50 vgg16_bn densenet121 mobilenet_v3_small convnext_tiny resnext50_32x4d regnet_y_400mf "
    "efficientnet_b0 swin_t"
)
_GPT2 = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 16}
_LLAMA = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "num_attention_heads": 4}
_OF_LLAMA = partial(_transformers, "Llama", "LlamaForCausalLM", **_LLAMA)
NETWORKS: dict[str, partial[Made]] = {
    **{name: partial(_torchvision, name, 64) for name in _PICTURES.split()},
    "vit_b_16": partial(_torchvision, "vit_b_16", 224),
    **{f"timm.{name}": partial(_timm, name, 64) for name in ("resnet50", "convnext_nano")},
    **{f"timm.{name}": partial(_timm, name, 224) for name in ("vit_tiny_patch16_224", "mixer_s16_224")},
    "gpt2": partial(_transformers, "GPT2", "GPT2LMHeadModel", **_GPT2),
    "llama": partial(_OF_LLAMA, num_key_value_heads=4),
    "llama-grouped": partial(_OF_LLAMA, num_key_value_heads=2),
}
"""How to make each network, with its example inputs; the function's name says whose it is."""

_declared: list[torch.library.Library] = []


def import_torchvision() -> None:
    """Import torchvision, or its Python files alone where tools/install_torchvision.sh found no build for this torch:
    no network here uses its compiled operations, but its import asks for two to be declared.

    Raises:
        ModuleNotFoundError: neither is there.
    """
    try:
        import torchvision
    except (ModuleNotFoundError, RuntimeError):  # not there, or of another build than torch
        if not _declared:
            sys.path.append(str(Path(sys.prefix) / "share" / "torchvision"))
            _declared.append(torch.library.Library("torchvision", "DEF"))  # what it declares goes with it
            for name in ("nms", "qnms"):
                _declared[0].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        import torchvision  # noqa: F401


def row(name: str) -> str:
    """One line of the table."""
    package = NETWORKS[name].func.__name__.removeprefix("_")
    model, inputs = NETWORKS[name]()
    began = time.perf_counter()
    try:
        symmetry = derive_symmetry(model, inputs, verify=False)
        traced = time.perf_counter()
        verify_symmetry(model, symmetry, inputs, controls=False)
        proven = time.perf_counter()
    except FastarError as why:
        text = str(why).replace("|", "/")
        return f"| {name} | {package} | refused: {text} | | | |"
    units, inside = (sum(g.size for g in symmetry.groups if g.parent or not blocks) for blocks in (False, True))
    return (
        f"| {name} | {package} | {len(symmetry.groups)} | {units:,} | {inside:,} | "
        f"{traced - began:.1f} + {proven - traced:.1f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    listed = ", ".join(NETWORKS)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"networks (default: all installed): {listed}")
    parser.add_argument("--write", action="store_true", help=f"put the table into {DOCS.name}")
    options = parser.parse_args()
    for name in options.names:
        if name not in NETWORKS:
            parser.error(f"no network {name!r}: give some of {listed}")
    warnings.simplefilter("ignore")
    names = options.names or list(NETWORKS)
    lines = [
        "| network | of | groups | units | of these in blocks | seconds (graph + proof) |",
        "|---|---|---|---|---|---|",
    ]
    for name in names:
        try:
            lines.append(row(name))
        except ModuleNotFoundError as missing:
            lines.append(f"| {name} | {missing.name} | not installed | | | |")
        print(lines[-1], file=sys.stderr, flush=True)
    where = f"torch {torch.__version__}, Python {platform.python_version()}, {torch.get_num_threads()} CPU thread(s)"
    table = "\n".join([*lines, "", f"Seconds: {where}."])
    if options.write:
        pattern = re.escape(BEGIN) + ".*?" + re.escape(END)
        text = DOCS.read_text()
        if not re.search(pattern, text, re.DOTALL):
            raise SystemExit(f"{DOCS}: the marks {BEGIN} and {END} are missing")
        DOCS.write_text(re.sub(pattern, lambda _: f"{BEGIN}\n{table}\n{END}", text, flags=re.DOTALL))
    else:
        print(table)


if __name__ == "__main__":
    main()
