# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""`attnres-export`: a program with a cache, for batches and lengths that weren't traced, as its runtime runs it."""

import json
import sys
from pathlib import Path

import pytest
import torch
from attnres_convert import InputError
from attnres_convert.verification import Float64
from attnres_recipes.data import train_tokenizer
from attnres_recipes.exporting import export_model, open_export, positions, verify
from behaviours import in_float64, rounding
from families import relative_error, tiny_model, tokens

from attnres_kernels.cpu import compiler


ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "benchmarks")]

import export as command  # noqa: E402
import export_table  # noqa: E402
from pages import section  # noqa: E402


SIZES = {"num_hidden_layers": 2, "attn_res_block_size": 1}
slow = pytest.mark.slow
AOTI = [slow, pytest.mark.timeout(1200), pytest.mark.skipif(compiler() is None, reason="needs g++")]
CASES = [
    pytest.param("torch", "denseformer", False),
    pytest.param("onnx", "block", False),
    pytest.param("onnx", "full", True, marks=slow),
    pytest.param("aoti", "block", False, marks=AOTI),
]


def save(model, folder: Path) -> str:
    model.save_pretrained(folder)
    train_tokenizer(["import this"], 280).save_pretrained(folder)
    return str(folder)


def padded(batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of different lengths, with padding on the left, and their mask."""
    ids, mask = tokens(batch, length), torch.ones(batch, length, dtype=torch.long)
    mask[0, :2] = 0
    return ids * mask, mask


@pytest.mark.parametrize("name, mode, sum_scale", CASES)
@torch.no_grad()
def test_program(name, mode, sum_scale, tmp_path):
    """Read in pieces, logits are as close to float64 as the model's own may be, and greedy tokens are generate's."""
    model = tiny_model(attn_res_mode=mode, attn_res_sum_scale=sum_scale, **SIZES)
    assert mode == "denseformer" or model.model.depth_attention.query.abs().min() > 0
    export_model(model, tmp_path, name)
    program = open_export(tmp_path)

    ids, mask = padded(3, 19)
    logits, cache = program(ids[:, :11], mask[:, :11])
    more, cache = program(ids[:, 11:], mask, cache)
    assert cache[0].shape[2] == 19
    with Float64():
        options = {"attention_mask": mask, "position_ids": positions(mask), "use_cache": False}
        expected = in_float64(model)(ids, **options).logits
    kept = mask.bool()
    bound = rounding(mode="full" if mode == "full" else "block", block_size=1).logits
    assert relative_error(torch.cat([logits, more], 1)[kept], expected[kept]) <= bound

    chosen = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    for ids, mask in (padded(2, 7), (tokens(1, 1), torch.ones(1, 1, dtype=torch.long))):
        assert torch.equal(program.generate(ids, 12, mask), model.generate(ids, attention_mask=mask, **chosen))


@torch.no_grad()
def test_a_wrong_program_is_found(tmp_path):
    """One that is off in a logit, or that forgets the cache, isn't passed."""
    model = tiny_model(**SIZES)
    export_model(model, tmp_path, "torch")
    program = open_export(tmp_path)
    difference, tolerance = verify(program, model, "torch")
    assert 0 < difference <= tolerance < 1e-3
    right = program.run
    program.run = lambda *given: [right(*given)[0] * (1 + 1e-3), *right(*given)[1:]]
    with pytest.raises(InputError, match=r"off by 1\.\de-03 of the largest"):
        verify(program, model, "torch")
    program.run = lambda *given: [right(*given)[0], *(torch.zeros_like(states) for states in right(*given)[1:])]
    with pytest.raises(InputError, match="off by"):
        verify(program, model, "torch")


def test_command(tmp_path, capsys):
    """The folder has all that is needed, and the summary says what was measured; a folder in the way stays."""
    words = [save(tiny_model(**SIZES, vocab_size=300), tmp_path / "model"), str(tmp_path / "out"), "--format", "torch"]
    command.main(words)
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert f"{record['difference']:.1e} of the largest logit" in printed and "model.pt2" in printed
    assert {"config.json", "export.json", "model.pt2", "tokenizer.json"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }
    with pytest.raises(SystemExit, match="use --force"):
        command.main(words)
    assert json.loads((tmp_path / "out" / "export.json").read_text()) == record


@pytest.mark.parametrize(
    "family, words, message",
    [
        ("kimi_linear", [], "attnres_kimi_linear can't be exported: its linear attention keeps"),
        ("llama", ["--format", "executorch"], "executorch isn't installed, which executorch needs"),
    ],
)
def test_refused(family, words, message, tmp_path):
    """In one line, and nothing is left."""
    model = save(tiny_model(family, vocab_size=300), tmp_path / "model")
    with pytest.raises(SystemExit, match=message) as error:
        command.main([model, str(tmp_path / "out"), *words])
    assert "\n" not in str(error.value) and [path.name for path in tmp_path.iterdir()] == ["model"]


def test_table():
    """The table of the page is that of the results, whose differences were allowed."""
    rows = json.loads((ROOT / "results" / "export.json").read_text())["rows"]
    assert section(ROOT / "docs" / "guides" / "export.md", "export") == export_table.markdown(rows)
    cells = [cell for row in rows.values() for cell in row.values() if "refused" not in cell]
    assert cells and all(cell["difference"] <= cell["tolerance"] < 1e-3 for cell in cells)
