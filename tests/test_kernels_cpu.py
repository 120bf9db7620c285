# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""How the kernels for CPUs are compiled, kept and chosen. What they compute is tested in test_kernels_fused.py."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from behaviours import Float64, assert_close, in_float64
from families import tiny_model, tokens
from instructions import INSTRUCTIONS, needs_compiler, use_instructions
from marks import mostly_slow

from attnres_kernels import cpu
from attnres_kernels.fused import FusedDepthAttention, closed_reads, depth_step


pytestmark = needs_compiler

QUIET = "from attnres_convert.cli import quieten_torchao; quieten_torchao()"
READ = f"""
{QUIET}
import torch
from attnres import DepthAttentionInterface, eager_depth_attention
name = DepthAttentionInterface.default
sources = [torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(i)) for i in range(3)]
product = torch.linspace(-1, 1, 16)
found = DepthAttentionInterface().get_interface(name)(sources, product, 1e-5, 1)
torch.testing.assert_close(found[0], eager_depth_attention(sources, product, 1e-5, 1)[0])
print(name)
"""


def start(cache: Path, **environment) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", READ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "XDG_CACHE_HOME": str(cache), **environment},
    )


def read(cache: Path, **environment) -> tuple[str, str]:
    """The default implementation of a new process, after a read with it, and what it has written to stderr."""
    process = start(cache, **environment)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    return output.strip(), errors


def recording_compiler(folder: Path) -> tuple[Path, Path]:
    """A compiler that writes a line for each time it compiles something."""
    script, log = folder / "compiler", folder / "log"
    script.write_text(f'#!/bin/sh\ncase "$*" in *-shared*) echo compiled >> {log};; esac\nexec g++ "$@"\n')
    script.chmod(0o755)
    log.touch()
    return script, log


@pytest.mark.slow
def test_compiled_once(tmp_path):
    """The first processes compile, several at a time without harm; later ones find the library."""
    script, log = recording_compiler(tmp_path)
    processes = [start(tmp_path / "cache", CXX=str(script)) for _ in range(2)]
    for process in processes:
        output, errors = process.communicate()
        assert process.returncode == 0 and output.strip() == "cpp", errors
    compiled = log.read_text().count("compiled")
    assert 1 <= compiled <= 2
    assert read(tmp_path / "cache", CXX=str(script))[0] == "cpp"
    assert log.read_text().count("compiled") == compiled
    assert [path.suffix for path in (tmp_path / "cache" / "attnres").iterdir()] == [".so"]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    return cpu.build(tmp_path_factory.mktemp("built"))


def compiler_script(path: Path, lines: str, environment: pytest.MonkeyPatch) -> Path:
    """Makes a program the compiler, which finds the file that it should write in `$out`."""
    find = 'case "$1" in --version) echo fake; exit;; esac\nwhile [ "$1" != -o ]; do shift; done\nout=$2\n'
    path.write_text(f"#!/bin/sh\n{find}{lines}\n")
    path.chmod(0o755)
    environment.setenv("CXX", str(path))
    return path


class Places:
    """The two folders where libraries may be kept, and a compiler that takes no time and counts."""

    def __init__(self, folder: Path, built: Path, environment: pytest.MonkeyPatch):
        self.cache, self.temporary = folder / "cache" / "attnres", folder / "temporary" / f"attnres-{os.geteuid()}"
        self.log, self.warnings = folder / "log", []
        self.temporary.parent.mkdir()
        self.log.touch()
        compiler_script(folder / "compiler", f'cp {built} "$out"; echo compiled >> {self.log}', environment)
        environment.setenv("XDG_CACHE_HOME", str(self.cache.parent))
        environment.setattr(tempfile, "tempdir", str(self.temporary.parent))
        environment.setattr(cpu.logger, "warning", self.warnings.append)

    def load(self) -> tuple[Path, int, list[str]]:
        """The folder of the library that a process loads, how often it has compiled, and its warnings."""
        self.log.write_text("")
        self.warnings.clear()
        loaded = cpu.library.__wrapped__()
        return Path(loaded._name).parent, self.log.read_text().count("compiled"), list(self.warnings)


@pytest.fixture
def places(tmp_path, built, monkeypatch) -> Places:
    return Places(tmp_path, built, monkeypatch)


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


def to_link(path: Path):
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def give_away(path: Path):
    os.chown(path, 12345, -1)


CHANGES = [
    pytest.param(lambda path: path.chmod(0o777), "others may write", id="writable"),
    pytest.param(lambda path: path.chmod(0o770), "others may write", id="writable by a group"),
    pytest.param(to_link, "is a link", id="link"),
    pytest.param(give_away, "belongs to another user", id="of another user", marks=needs_root),
]


@pytest.mark.parametrize("change, reason", CHANGES)
def test_folders_that_others_could_change(places, change, reason):
    """Nothing is loaded from there or put there: a temporary folder of the user takes its place, with one warning."""
    assert places.load() == (places.cache, 1, [])
    assert places.load() == (places.cache, 0, [])
    change(places.cache)
    before = list(places.cache.iterdir())
    folder, compiled, warnings = places.load()
    assert (folder, compiled, len(warnings)) == (places.temporary, 1, 1)
    assert reason in warnings[0] and str(places.cache) in warnings[0] and "XDG_CACHE_HOME" in warnings[0]
    assert places.load() == (places.temporary, 0, [])
    assert places.temporary.stat().st_mode & 0o777 == 0o700
    assert list(places.cache.iterdir()) == before


@pytest.mark.parametrize("change, reason", [CHANGES[0], CHANGES[1], CHANGES[3]])
def test_folders_above_that_others_could_change(places, change, reason):
    """Who may rename a folder can put another in its place; a sticky one, as /tmp, is safe, and so is a link to one."""
    assert places.load()[0] == places.cache
    change(places.cache.parent)
    folder, _, warnings = places.load()
    assert folder == places.temporary and reason in warnings[0]
    os.chown(places.cache.parent, os.geteuid(), -1)
    places.cache.parent.chmod(0o1777)
    assert places.load() == (places.cache, 0, [])
    to_link(places.cache.parent)
    assert places.load() == (places.cache.parent.resolve() / "attnres", 0, [])


@pytest.mark.parametrize("change, reason", CHANGES)
def test_files_that_others_could_change(places, change, reason):
    """They are compiled again, and replaced."""
    places.load()
    (library,) = places.cache.iterdir()
    change(library)
    assert places.load() == (places.cache, 1, [])
    assert cpu.danger_of(library) is None
    assert places.load() == (places.cache, 0, [])


@pytest.mark.parametrize("cache", ["/proc/no", "/dev/null"])
def test_where_nothing_can_be_written(places, monkeypatch, cache):
    """The temporary folder takes its place; if that is no better, each process compiles, and says so."""
    monkeypatch.setenv("XDG_CACHE_HOME", cache)
    folder, compiled, warnings = places.load()
    assert (folder, compiled, len(warnings)) == (places.temporary, 1, 1) and f"{cache}/attnres" in warnings[0]
    assert places.load() == (places.temporary, 0, [])
    shutil.rmtree(places.temporary)
    places.temporary.touch()
    for _ in range(2):
        _, compiled, warnings = places.load()
        assert compiled == len(warnings) == 1 and "each process compiles" in warnings[0]
    assert [path.name for path in places.temporary.parent.iterdir()] == [places.temporary.name]


def test_what_a_killed_process_has_left(places):
    """Its folder goes when it is old."""
    places.load()
    for library in places.cache.iterdir():
        library.unlink()
    old, new = places.cache / "building-old", places.cache / "building-new"
    for folder in (old, new):
        folder.mkdir()
    os.utime(old, (0, 0))
    places.load()
    assert not old.exists() and new.exists()


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("ends", ["never", "with a failure", "well"])
def test_nothing_is_left_of_a_compiler(tmp_path, places, monkeypatch, built, ends):
    """Neither the processes it has started nor its temporary files; one that doesn't end is ended."""
    last = {"never": "sleep 1000", "with a failure": "exit 1", "well": f'cp {built} "$out"'}[ends]
    lines = f'touch "$TMPDIR/part"\nsleep 1000 >/dev/null 2>&1 &\necho $! $$ > {tmp_path}/pids\n{last}'
    compiler_script(tmp_path / "slow", lines, monkeypatch)
    monkeypatch.setattr(cpu, "COMPILE_SECONDS", 2)
    start = time.monotonic()
    if ends == "well":
        places.load()
    else:
        reason = "took more than 2 seconds" if ends == "never" else "slow failed"
        with pytest.raises(RuntimeError, match=reason):
            places.load()
    assert time.monotonic() - start < 20
    deadline = time.monotonic() + 5
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_running, pids))
    assert [path.suffix for path in places.cache.iterdir()] == ([".so"] if ends == "well" else [])
    assert not list(places.temporary.parent.iterdir())


@pytest.mark.parametrize("command", ["{folder}/ccache g++", "g++ -m64", "'{folder}/a c++' -O1", " "])
def test_commands(tmp_path, monkeypatch, command):
    """CXX may hold a launcher, options and quotes, as make takes them."""
    for name, line in (("ccache", 'exec "$@"'), ("a c++", 'exec g++ "$@"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("CXX", command.format(folder=tmp_path))
    monkeypatch.setattr(cpu, "SOURCE", 'extern "C" int seven() { return 7; }\n')
    (tmp_path / "build").mkdir()
    built = cpu.build(tmp_path / "build")
    assert cpu.ctypes.CDLL(str(built)).seven() == 7
    keys = {cpu.build_key()}
    monkeypatch.setenv("CXX", f"{command.format(folder=tmp_path).strip() or 'g++'} -O2")
    assert cpu.build_key() not in keys


@pytest.mark.parametrize("command", ["no-such-compiler", "g++ '"])
def test_no_compiler(monkeypatch, command):
    monkeypatch.setenv("CXX", command)
    assert cpu.compiler() is None and command in cpu.missing_compiler()
    with pytest.raises(RuntimeError, match=re.escape(command)):
        cpu.build_key()


def test_a_compiler_that_is_no_program(tmp_path, monkeypatch):
    (tmp_path / "text").write_text("no program")
    (tmp_path / "text").chmod(0o755)
    monkeypatch.setenv("CXX", str(tmp_path / "text"))
    with pytest.raises(RuntimeError, match="text doesn't run"):
        cpu.build_key()


ASK = f"""
{QUIET}
from attnres import AttnResConfig, AttnResForCausalLM, DepthAttentionInterface
print(DepthAttentionInterface.default)
sizes = dict(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
AttnResForCausalLM(AttnResConfig(**sizes), attn_res_implementation="cpp")
"""


def test_without_a_compiler():
    """Then PyTorch is the default, without a word; who asks for the kernels is told in a line why there are none."""
    environment = {**os.environ, "CXX": "no-such-compiler"}
    done = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "two_phase" and done.stderr.startswith("Traceback")
    line = done.stderr.splitlines()[-1]
    assert line.startswith("ValueError: 'cpp'") and "no no-such-compiler: install g++" in line and "two_phase" in line


@pytest.mark.slow
def test_a_damaged_library_is_compiled_again(tmp_path):
    script, log = recording_compiler(tmp_path)
    for times in (1, 2):
        assert read(tmp_path / "cache", CXX=str(script)) == ("cpp", "")
        assert log.read_text().count("compiled") == times
        for library in (tmp_path / "cache" / "attnres").iterdir():
            library.write_bytes(library.read_bytes()[:1000])


@pytest.mark.parametrize("message", [pytest.param("", marks=pytest.mark.slow), "kernels.cpp:1: error: no such thing"])
def test_a_compiler_that_fails(tmp_path, message):
    """One warning says what failed, PyTorch computes instead, and nothing is left behind in the cache."""
    script = tmp_path / "compiler"
    script.write_text(f"#!/bin/sh\necho '{message}' >&2\nexit 1\n")
    script.chmod(0o755)
    output, errors = read(tmp_path / "cache", CXX=str(script))
    assert output == "cpp" and errors.count("don't run on cpu") == 1
    assert (message or "compiler failed") in errors and "runs in PyTorch instead" in " ".join(errors.split())
    assert not list((tmp_path / "cache" / "attnres").iterdir())


@pytest.fixture(params=INSTRUCTIONS)
def instructions(request, monkeypatch):
    use_instructions(request.param, monkeypatch)


def results(num_threads: int) -> list[torch.Tensor]:
    """Results and gradients of a small block of reads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        generator = torch.Generator().manual_seed(0)
        shapes = [(3, 100, 200)] * 4 + [(2, 200), (200,)]
        tensors = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
        *sources, output, products, gain = tensors
        mixed, lse = closed_reads(sources, products, 1e-5)
        step = depth_step(mixed[0], output, mixed[1], lse[1], products[1], 1e-5, norm_weight=gain, norm_eps=1e-5)
        return [
            step.normed,
            step.partial,
            *torch.autograd.grad([step.normed.sum(), step.partial.square().sum()], tensors),
        ]
    finally:
        torch.set_num_threads(threads)


@pytest.mark.usefixtures("instructions")
def test_as_many_threads_as_wanted():
    """Every bit is the same with one thread and with several, gradients of parameters included."""
    assert all(torch.equal(a, b) for a, b in zip(results(1), results(3), strict=True))


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("width", [1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 4099])
def test_widths(width):
    """Rows that vectors don't fill, and long ones: as exact as eager."""
    generator = torch.Generator().manual_seed(0)
    sources = [torch.randn(2, 3, width, generator=generator) for _ in range(5)]
    products = torch.randn(5, width, generator=generator) * 2 * width**-0.5
    mixed, lse = closed_reads(sources, products, 1e-5)
    values = torch.stack(sources).double()
    scores = torch.einsum("nbsd,rd->rnbs", values, products.double()) * (values.square().mean(-1) + 1e-5).rsqrt()
    assert_close(torch.stack(mixed), torch.einsum("rnbs,nbsd->rbsd", scores.softmax(1), values).float(), 1e-6)
    assert_close(lse, scores.logsumexp(1).float(), 1e-6)


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("tokens", [(1, 1), (2, 40)], ids=["one token", "many"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_a_number_stays_one(tokens, value):
    """What eager makes of it: a token that isn't finite gives a read that isn't, and leaves the others alone."""
    model = tiny_model()
    embeds = torch.randn(*tokens, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    embeds[0, 0, 3] = value
    with torch.no_grad():
        found, expected = (
            (model.set_attn_res_implementation(name), model(inputs_embeds=embeds, use_cache=False).logits)[1]
            for name in ("cpp", "eager")
        )
    assert torch.equal(found.isfinite(), expected.isfinite()) and not found[0, 0].isfinite().any()


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("num_tokens", [2, 15, 16, 17, 300])
def test_extreme_scores(num_tokens):
    """Scores so far apart that a weight is zero, some equal, and a token that isn't a number, forward and backward."""
    generator, width = torch.Generator().manual_seed(0), 24
    values = [torch.randn(num_tokens, width, generator=generator) for _ in range(4)]
    values[1] = values[0].clone()  # equal scores
    products = torch.randn(3, width, generator=generator)
    products[1:] *= torch.tensor([[0.0], [60.0]])
    broken = num_tokens // 2
    values[2][broken] = float("nan")
    found, exact = (
        [v.to(dtype).requires_grad_() for v in (*values, products)] for dtype in (torch.float32, torch.double)
    )
    mixed, lse, weights = closed_reads(found[:-1], found[-1], 1e-5, return_weights=True)
    scores = torch.stack([(v @ exact[-1].T) * (v.square().mean(-1, keepdim=True) + 1e-5).rsqrt() for v in exact[:-1]])
    expected = torch.einsum("ntr,ntd->rtd", scores.softmax(0), torch.stack(exact[:-1]))
    whole = torch.arange(num_tokens) != broken
    assert all(read[~whole].isnan().all() for read in mixed)
    # scores of hundreds are as exact as float32 is there
    for read, exact_read, tolerance in zip(mixed, expected, (1e-6, 1e-6, 1e-4)):
        assert_close(read[whole], exact_read[whole].float(), tolerance)
    assert_close(lse[:, whole], scores.logsumexp(0).T[:, whole].float(), 1e-6)
    assert torch.equal(weights[1, :, whole], torch.full((4, num_tokens - 1), 0.25))
    assert num_tokens < 15 or (weights[2][:, whole] == 0).any()
    directions = torch.randn(3, num_tokens, width, generator=generator)
    directions[:, broken] = 0
    got = torch.autograd.grad((torch.stack(mixed) * directions)[:, whole].sum() + lse[:, whole].sum(), found)
    wanted = torch.autograd.grad((expected * directions)[:, whole].sum() + scores.logsumexp(0).T[:, whole].sum(), exact)
    for own, right in zip(got[:-1], wanted[:-1]):
        assert_close(own[whole], right[whole].float(), 1e-4)


@torch.no_grad()
def test_outputs_of_another_dtype():
    """A sublayer that puts out float32 in a bfloat16 model, token by token and all at once: as far off as eager."""
    model = tiny_model(attn_res_block_size=2)
    exact, mlp = in_float64(model), model.to(torch.bfloat16).model.layers[1].mlp
    forward = mlp.forward
    mlp.forward = lambda *args: forward(*args).float()
    single, several = [tokens(1, 1, seed=seed) for seed in range(16)], [tokens(seed=seed) for seed in range(2)]
    for batches in (single, several):
        with Float64():
            expected = torch.cat([exact(input_ids).logits.flatten() for input_ids in batches])
        errors = {}
        for name in ("cpp", "eager"):
            model.set_attn_res_implementation(name)
            errors[name] = (torch.cat([model(input_ids).logits.flatten() for input_ids in batches]) - expected).norm()
        # two errors by chance, over so many tokens 0.8 to 1.4 of each other
        assert errors["cpp"] <= 2 * errors["eager"] < 0.2 * expected.norm()


@torch.no_grad()
@pytest.mark.parametrize("num_tokens", [1, 40])
def test_sources_that_a_hook_replaces(num_tokens):
    """Layers that get copies of the sources, which don't outlive them, read the copies."""
    model = tiny_model(attn_res_block_size=1)
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda module, args: tuple(None if t is None else t.clone() for t in args))
    expected = tiny_model(attn_res_block_size=1)(tokens(1, num_tokens)).logits
    for _ in range(3):
        assert_close(model(tokens(1, num_tokens)).logits, expected)


@pytest.mark.parametrize("mode", ["block", "full"])
def test_outputs_in_float16(mode):
    """Sublayers under autocast put out a dtype without kernels, in the middle of a block."""
    models = [tiny_model(attn_res_mode=mode, attn_res_implementation=name) for name in ("cpp", "two_phase")]
    with torch.autocast("cpu", torch.float16):
        losses = [model(tokens(2, 40), labels=tokens(2, 40)).loss for model in models]
    assert_close(*losses, 1e-3)


@torch.no_grad()
@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("num_tokens", [1, 40])
def test_strided_parameters(num_tokens):
    model, input_ids = tiny_model(), tokens(1, num_tokens)
    expected = model(input_ids).logits
    for norm in (model.model.layers[1].input_layernorm, model.model.layers[2].post_attention_layernorm):
        norm.weight = torch.nn.Parameter(norm.weight.repeat(3, 1).T.contiguous()[:, 1])
        assert norm.weight.stride() == (3,)
    for parameter in model.model.depth_attention.parameters():
        parameter.data = parameter.data.T.contiguous().T
    assert_close(model(input_ids).logits, expected)


def test_shapes_that_do_not_agree():
    """They are refused, with gradients and without, instead of reading past a tensor."""
    attention = FusedDepthAttention(cpu.CPP_KERNELS)
    sources = [torch.zeros(2, 40, 8), torch.zeros(1, 40, 8)]
    for context in (torch.no_grad, torch.enable_grad):
        with context():
            with pytest.raises(ValueError, match="ources"):
                attention(sources, torch.zeros(8), 1e-5, 1)
            with pytest.raises(ValueError, match="product"):
                attention(sources[:1] * 2, torch.zeros(9), 1e-5, 1)


TRY = """
import sys
import torch
from torch.utils.checkpoint import checkpoint
from attnres import AttnResConfig, AttnResForCausalLM
from attnres_kernels.fused import works_on
sizes = dict(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2)
model = AttnResForCausalLM(AttnResConfig(**sizes, bos_token_id=1, eos_token_id=2))
tokens = torch.arange(3, 12)[None]
if sys.argv[1] == "checkpoint":
    checkpoint(lambda tokens: model(tokens, labels=tokens).loss, tokens, use_reentrant=False).backward()
elif sys.argv[1] == "dtype":
    torch.set_default_dtype(torch.float64)
    model(tokens)
else:
    with torch.device("meta"), torch.no_grad():
        works_on(torch.device("cpu"))
assert works_on(torch.device("cpu"))
"""


@pytest.mark.parametrize("state", mostly_slow(["checkpoint", "dtype", "device"], "checkpoint"))
def test_tried_apart_from_what_is_going_on(state):
    """Checkpointing, defaults and the like neither disturb the first trial nor are disturbed by it."""
    done = subprocess.run([sys.executable, "-c", TRY, state], capture_output=True, text=True)
    assert done.returncode == 0 and "PyTorch instead" not in done.stderr, done.stderr


@torch.no_grad()
@pytest.mark.parametrize("num_tokens", [1, 6])
def test_vmap(num_tokens):
    """Transforms of functions, which kernels don't know, are left to PyTorch."""
    model, input_ids = tiny_model(), tokens(3, num_tokens)
    found = torch.vmap(lambda row: model(row[None], use_cache=False).logits[0])(input_ids)
    assert_close(found, model(input_ids, use_cache=False).logits)
