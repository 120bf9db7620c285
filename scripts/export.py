# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""python scripts/export.py my-attnres exported --format onnx

Writes a model as a program that runs without this project: ONNX, torch.export, AOTInductor or ExecuTorch. It takes
ids, a mask and a cache of keys and values, of any batch and length. The file is run and compared with the model before
the folder appears.
"""

from attnres_recipes.options import ExportOptions
from attnres_recipes.parser import need, parse


def parse_arguments(argv: list[str] | None = None) -> ExportOptions:
    return parse(ExportOptions, "export", __doc__, argv)


def main(argv: list[str] | None = None):
    options = parse_arguments(argv)
    need("export")
    from attnres_recipes.exporting import export  # takes seconds
    from attnres_recipes.process import command

    with command("export", "nothing was written."):
        rows = export(options)
    for name, value in rows.items():
        print(f"{name:{max(map(len, rows))}}  {value}")


if __name__ == "__main__":
    main()
