# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""The command `attnres-convert`."""

import argparse
import logging
import os
import sys


DESCRIPTION = """Convert a transformers checkpoint to Attention Residuals, exactly: the result computes what SRC
computes until it is trained. Weights are copied as files, never loaded; those of a GGUF file become floats first."""

EXAMPLES = """examples:
  attnres-convert path/to/llama path/to/llama-attnres
  attnres-convert organisation/model ./converted --revision main --block-size 4
  attnres-convert path/to/llama ./full --mode full --link
  attnres-convert path/to/llama ./window --mode full_window --set attn_res_window=100
  attnres-convert --to-donor ./converted ./llama-again
  attnres-convert model.Q4_K_M.gguf ./converted --dtype bfloat16
  attnres-convert organisation/model-GGUF ./converted --gguf-file model.Q8_0.gguf
  attnres-convert --dequantize bfloat16 openai/gpt-oss-20b ./gpt-oss-bf16
"""
DTYPES = ("bfloat16", "float32")
BY_ITSELF = "default"  # what --dequantize means without a dtype


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "attnres-convert",
        usage="attnres-convert [options] SRC DST (see --help)",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("src", metavar="SRC", help="checkpoint folder, GGUF file, or Hub id")
    parser.add_argument("dst", metavar="DST", help="folder to write")
    parser.add_argument(
        "--mode", help="block (default) or full Attention Residuals, or another of the table of modes, such as mhc"
    )
    parser.add_argument(
        "--set", action="append", metavar="NAME=N", help="a number of the mode, such as attn_res_window=4; repeatable"
    )
    parser.add_argument("--block-size", type=int, metavar="N", help="decoder layers per block (default: an eighth)")
    parser.add_argument("--num-blocks", type=int, metavar="N", help="number of blocks, instead of --block-size")
    parser.add_argument("--gguf-file", metavar="NAME", help="GGUF file in the folder or repository SRC")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of the weights from a GGUF file (default: bfloat16 if it is quantised or in bfloat16, otherwise float32)",
    )
    parser.add_argument("--link", action="store_true", help="hard-link the weights; SRC and DST then share the files")
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit of a Hub id")
    parser.add_argument("--force", action="store_true", help="replace DST, after everything else is done")
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="run both models and compare their logits, if they fit in free memory (default: on)",
    )
    parser.add_argument(
        "--to-donor", action="store_true", help="convert back to the donor; exact, so only while all queries are zero"
    )
    parser.add_argument(
        "--to-kimi-k3",
        action="store_true",
        help="write the donor's tensors, and depth attention under the names of Kimi K3 (block mode, unscaled reads)",
    )
    parser.add_argument(
        "--dequantize",
        choices=(BY_ITSELF, *DTYPES),
        metavar="DTYPE",
        help="write no AttnRes model but SRC itself, which is stored quantised (MXFP4, fp8, bitsandbytes, GGUF), with "
        "float weights: bfloat16 or float32; the dtype may be left out",
    )
    return parser


def _with_dtype(words: list[str]) -> list[str]:
    """The command line in which --dequantize has a value, so that argparse doesn't take the next word for it."""
    following = [*words[1:], ""]
    return [
        f"{word}={BY_ITSELF}" if word == "--dequantize" and after not in DTYPES else word
        for word, after in zip(words, following)
    ]


def quieten_torchao():
    """transformers imports it wherever it is installed, and it warns of what it has for other devices."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def main(argv: list[str] | None = None) -> int:
    quieten_torchao()
    arguments = build_parser().parse_args(_with_dtype(sys.argv[1:] if argv is None else argv))
    try:
        # not before, as these take seconds
        from .checkpoint import ConversionError
        from .reading import one_line
        from .report import report

        try:
            result = _convert(arguments)
        except ConversionError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    except KeyboardInterrupt:
        print("error: interrupted; nothing was written.", file=sys.stderr)
        return 130
    for warning in result.warnings:
        print(f"warning: {one_line(warning)}", file=sys.stderr)
    try:
        print(report(result), flush=True)
    except OSError:  # nobody reads it, and the result is there
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, what Python flushes at its end
    return 0


def _convert(arguments: argparse.Namespace):
    from .checkpoint import ConversionError
    from .conversion import convert_checkpoint, convert_to_donor, convert_to_kimi_k3
    from .dequantization import dequantize_checkpoint

    options = {name: value for name, value in vars(arguments).items() if value is not None}
    dtype = options.pop("dequantize", None)
    ways_back = {"--to-donor": convert_to_donor, "--to-kimi-k3": convert_to_kimi_k3}
    ways_back = {name: way for name, way in ways_back.items() if options.pop(name[2:].replace("-", "_"))}
    shape, gguf = ("mode", "block_size", "num_blocks", "set"), ("gguf_file", "dtype")

    def refuse(names: tuple[str, ...], why: str):
        if given := [f"--{name.replace('_', '-')}" for name in names if options.get(name, False) is not False]:
            raise ConversionError(f"{why}; leave out {', '.join(given)}.")

    if dtype is not None:
        if ways_back:
            raise ConversionError(f"--dequantize writes no AttnRes model; leave out {', '.join(ways_back)}.")
        refuse((*shape, "link"), "--dequantize writes new weights, and no AttnRes model")
        refuse(("dtype",), "--dequantize takes the dtype itself")
        del options["link"], options["verify"]
        return dequantize_checkpoint(**options, dtype=None if dtype == BY_ITSELF else dtype, progress=True)
    if not ways_back:
        fields = dict(map(_number, options.pop("set", [])))
        return convert_checkpoint(**options, fields=fields, progress=True)
    if len(ways_back) > 1:
        raise ConversionError(f"{' and '.join(ways_back)} are two ways; give one.")
    ((name, convert_back),) = ways_back.items()
    refuse(shape, f"{name} takes the shape from SRC")
    refuse(gguf, f"{name} takes an AttnRes checkpoint, which is no GGUF file")
    return convert_back(**options, progress=True)


def _number(text: str) -> tuple[str, int]:
    from .checkpoint import ConversionError

    name, _, value = text.partition("=")
    if not value.lstrip("-").isdecimal():
        raise ConversionError(f"--set is {text!r}; give a name and an integer, such as attn_res_window=4.")
    return name, int(value)


if __name__ == "__main__":
    sys.exit(main())
