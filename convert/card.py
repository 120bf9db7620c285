# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Model cards: of converted, pretrained and fine-tuned models, and of adapters.

What a card says comes from the files of its folder: the configuration, `results.json` and the figure. Numbers are those
of `results.json`. The metadata of the model that it was made from (license, languages, data sets) are taken over.
"""

import json
import math
import os
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCardData

from . import reading
from .reading import (
    ADAPTER_NAME,
    CARD_NAME,
    CONFIG_NAME,
    InputError,
    check_config,
    is_regular,
    parse_metadata,
    read_text,
    texts,
    typed,
)
from .writing import decimals, table, write_text


DONOR_CARD_NAME = "DONOR_README.md"
RESULTS_NAME = "results.json"
FIGURE_NAME = "depth_attention.png"
TOKENIZER_NAME, CHAT_TEMPLATE_NAME = "tokenizer_config.json", "chat_template.jinja"
EVAL_RESULTS = ".eval_results"  # where the Hub looks for results on its benchmarks
TAG = "attention-residuals"
PAPER = "https://arxiv.org/abs/2603.15031"
KEPT_METADATA = (
    "base_model",
    "base_model_relation",
    "datasets",
    "language",
    "license",
    "license_link",
    "license_name",
    "pipeline_tag",
    "tags",
)
LISTS = ("base_model", "datasets", "language", "license", "tags")  # of the metadata; the others are texts
NUMBER = (int, float)

# What a card shows of results.json, part by part. Other files of this name, or broken ones, are left alone.
SHOWN = {
    "results": {
        **dict.fromkeys(("base", "command", "data", "method", "revision", "sharding"), str),
        **dict.fromkeys(("depth_parameters", "documents", "examples", "parameters", "processes", "steps"), int),
        **dict.fromkeys(("tokens", "trained_parameters", "training_tokens"), int),
        **dict.fromkeys(("held_out_loss_before", "merged_relative_error"), NUMBER),
        **dict.fromkeys(("base_is_hub", "converted"), bool),
        **dict.fromkeys(("arguments", "conversion", "dequantized", "model_config", "versions"), dict),
        "language": (str, list),
        "datasets": list,
        "evaluation": list,
        "samples": list,
    },
    "arguments": {
        **dict.fromkeys(("seed", "seq_len"), int),
        **dict.fromkeys(("optimizer", "quantization", "schedule"), str),
        "learning_rate": NUMBER,
        "bf16": bool,
    },
    "conversion": {
        **dict.fromkeys(("donor_class", "dtype", "project", "verification_skipped"), str),
        "parameters_added": int,
        "tensors_added": list,
        **dict.fromkeys(("donor_rounding", "relative_difference", "tolerance"), NUMBER),
    },
    "dequantized": dict.fromkeys(("architecture", "dtype", "file", "format", "name", "quantization"), str),
    "evaluation": {**dict.fromkeys(("metric", "type", "dataset", "dataset_id", "task_id"), str), "value": NUMBER},
    "sample": dict.fromkeys(("prompt", "answer", "reference"), str),
    "adapter": {"peft_type": str, "base_model_name_or_path": str},
}
NEEDED = {  # a field, or one that begins a part, and what is shown with it
    "results": {
        "": ("command",),
        "arguments": ("data", "steps", "tokens"),
        "method": ("arguments",),
        "parameters": ("depth_parameters",),
        "tokens": ("arguments",),
        "trained_parameters": ("depth_parameters",),
    },
    "arguments": {"": ("bf16", "learning_rate", "optimizer", "schedule", "seed", "seq_len")},
    "conversion": {"": ("parameters_added",), "relative_difference": ("dtype",)},
    "dequantized": {"": ("dtype", "format", "quantization")},
    "evaluation": {"": ("metric", "type", "dataset", "value"), "task_id": ("dataset_id",)},
    "sample": {"": ("prompt", "answer", "reference")},
    "adapter": {},
}
SAMPLE_NAMES = {"model": "answer", "data": "reference"}
CONFIG_FACTS = ("architectures", "attn_res_mode", "attn_res_block_size", "num_hidden_layers", "hidden_size")
PIPELINE_TAGS = {
    "ForCausalLM": "text-generation",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "": "feature-extraction",
}
FEW_TOKENS = 10**9
COMMAND_WIDTH = 110

IDEA = (
    "Attention Residuals replace the sum of the residual stream: before each attention, each MLP and the output, a "
    "learned query weighs the embedding and what earlier layers wrote by a softmax over depth, and their mix is read "
    f"([Kimi Team 2026, arXiv:2603.15031]({PAPER}))."
)
BASELINE = f"It is a baseline for Attention Residuals ([Kimi Team 2026, arXiv:2603.15031]({PAPER}))"
VARIANTS = {  # of block and full mode, and what is different there
    "sigmoid": "each weight is a sigmoid of its own, and no part of a softmax",
    "raw_keys": "keys have no norm",
    "static": "scores are learned numbers, which don't depend on the input",
    "window": "a read has the embedding and only the latest of the other sources",
    "heads": "each group of channels has weights of its own",
    "input_query": "a query is computed from the latest source",
    "low_rank": "keys are projections to few numbers, as in LR-AttnRes (https://github.com/jon123boss/LR-AttnRes)",
    "delta": "a read is the residual stream with a mix of its parts added, as in Delta Attention Residuals "
    "(https://arxiv.org/abs/2605.18855)",
    "recency": "states of the residual stream are weighed, and the latest has a bias, as in open-attention-residuals "
    "(https://github.com/wdlctc/open-attention-residuals)",
    "inkling2": "normalised sources are weighed, as in Inkling 2",
}
ABOUT = {
    None: IDEA,
    "block": f"{IDEA} In block mode, as here, outputs are summed within blocks of {{block_size}}, and "
    "the queries weigh the blocks.",
    "full": f"{IDEA} In full mode, as here, the output of every attention and every MLP has a weight of its own.",
    **{
        f"block_{name}": f"{IDEA} Here, outputs are summed within blocks of {{block_size}}, and {text}."
        for name, text in VARIANTS.items()
    },
    **{
        f"full_{name}": f"{IDEA} Here, the output of every attention and every MLP is a source, and {text}."
        for name, text in VARIANTS.items()
    },
    "denseformer": "Each attention, each MLP and the output read a sum of the embedding and all earlier outputs with "
    "learned weights that don't depend on the input, as in DenseFormer (https://arxiv.org/abs/2402.02622). "
    f"{BASELINE}, whose weights are a softmax over depth.",
    "hc": "Instead of one residual stream there are several, which are read, written and mixed with learned weights, "
    f"as in hyper-connections (https://arxiv.org/abs/2409.19606). {BASELINE}.",
    "mhc": "Instead of one residual stream there are several, which are read, written and mixed with learned weights, "
    "of which those that mix are doubly stochastic, as in manifold-constrained hyper-connections "
    f"(https://arxiv.org/abs/2512.24880). {BASELINE}.",
    "block_mhc": f"{IDEA} Here, outputs are summed within blocks of {{block_size}}. The block that is open is kept as "
    "several streams, as in manifold-constrained hyper-connections (https://arxiv.org/abs/2512.24880), and attention "
    "over depth reads the closed blocks and a mix of the streams.",
    "donor": "It has the plain residual stream of transformers: every attention and every MLP reads the sum of all "
    "that was written before. It is a baseline for models with Attention Residuals, which weigh what they read over "
    f"depth ([Kimi Team 2026, arXiv:2603.15031]({PAPER})), and a source to convert them from.",
}
OTHERS = {  # modes without attention over depth, and what they have
    "donor": "the plain residual stream",
    "denseformer": "fixed weights over depth",
    "hc": "hyper-connections",
    "mhc": "manifold-constrained hyper-connections",
}

PLACEHOLDER = "name-of-the-model"  # where a card is rendered to find its lines with names
CITATION = """```bibtex
@misc{kimiteam2026attentionresiduals,
  title = {Attention Residuals},
  author = {{Kimi Team}},
  year = {2026},
  eprint = {2603.15031},
  archivePrefix = {arXiv}
}
```"""

CHAT = """\
messages = [{"role": "user", "content": "What is a residual stream?"}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt", return_token_type_ids=False)
answer = model.generate(**inputs, max_new_tokens=100)[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))"""

EXACTNESS = """All tensors of the source are kept, bit for bit, under their names. With the queries at zero all outputs
that a read mixes weigh the same, and each read is multiplied by their number, so it is the sum that the source model's
residual stream holds: until the queries are trained, the model computes what the source model computes, and
`attnres-convert --to-donor` goes back."""
EXACTNESS_OF_OTHERS = """All tensors of the source are kept, bit for bit, under their names. What was added begins with
values for which each read is the sum that the source model's residual stream holds: until they are trained, the model
computes what the source model computes, and `attnres-convert --to-donor` goes back."""
SAME_DEPTH = """The source has depth attention already. Its tensors became `depth_attention`, in float32, for which this
project's code computes the same reads; all other tensors are kept, bit for bit, under their names."""


@dataclass(frozen=True)
class Result:
    """A number that was measured.

    Args:
        metric: for people, with its unit: "held-out loss (nats per token)".
        type: the Hub's name of the metric, such as `loss` or `perplexity`.
        value: as in `results.json`.
        dataset: for people.
        dataset_id: on the Hub, if it is there.
        task_id: of a benchmark of the Hub, as its `eval.yaml` names it. Such results go to `.eval_results`, the only
            place for them; that place is for nothing else, so all others are in the card's metadata.
    """

    metric: str
    type: str
    value: float
    dataset: str
    dataset_id: str | None = None
    task_id: str | None = None


@dataclass(frozen=True)
class Card:
    """What a card says. Texts are Markdown; what is `None` or empty is left out.

    Args:
        title: how the model is called, in the heading and where it is loaded: the repository, once there is one.
        summary: a sentence or two.
        about: what Attention Residuals are, or what else the model has.
        base_model: ids on the Hub, never paths.
        making: rows of a table, name and value; `command` stands above it and `notes` below.
        samples: prompts, answers of the model, and references, those of the data.
        figure: file name of the heat map of depth weights.
        snippet: Python that loads the model.
        limits: sentences.
        donor_card: whether the card of the source is there as `DONOR_README.md`.
    """

    title: str
    summary: str
    about: str
    snippet: str
    library_name: str = "transformers"
    pipeline_tag: str | None = None
    license: str | list[str] | None = None
    license_name: str | None = None
    license_link: str | None = None
    base_model: str | list[str] | None = None
    base_model_relation: str | None = None
    datasets: str | list[str] | None = None
    language: str | list[str] | None = None
    tags: tuple[str, ...] = ()
    results: tuple[Result, ...] = ()
    command: str | None = None
    making: tuple[tuple[str, str], ...] = ()
    notes: str = ""
    samples: tuple[dict[str, str], ...] = ()
    figure: str | None = None
    limits: tuple[str, ...] = ()
    donor_card: bool = False

    @property
    def is_attnres(self) -> bool:
        return TAG in self.tags

    def metadata(self) -> ModelCardData:
        """What the Hub reads, with the results that aren't those of its benchmarks."""
        names = ("license", "license_name", "license_link", "base_model", "base_model_relation", "library_name")
        names += ("pipeline_tag", "datasets", "language")
        fields = {name: getattr(self, name) for name in names if getattr(self, name)}
        indexed = [_eval_result(result, self.pipeline_tag) for result in self.results if not result.task_id]
        if indexed:
            fields |= {"model_name": self.title, "eval_results": indexed}
        return ModelCardData(tags=list(self.tags) or None, **fields)

    def text(self) -> str:
        """The file."""
        sections = [f"---\n{self.metadata().to_yaml()}\n---\n\n# {self.title}", self.summary, self.about]
        if self.results:
            rows = [(result.metric, shown(result.value), result.dataset) for result in self.results]
            sections += ["## Results", table([("measured", "value", "on"), *rows], aligned=False).rstrip()]
        if self.samples:
            sections += ["## Samples", *_samples(self.samples)]
        if self.figure:
            text = "What each read (row) takes from which source (column), averaged over held-out text; the numbers "
            text += f"are in [{Path(self.figure).stem}.json]({Path(self.figure).stem}.json)."
            sections += ["## Depth weights", f"![Weights of all reads over depth]({self.figure})", text]
        if self.command or self.making:
            sections.append("## How it was made")
        if self.command:
            sections.append(f"```bash\n{_wrapped(self.command)}\n```")
        if self.making:
            sections.append(table([("", ""), *self.making], aligned=False).rstrip())
        sections += [self.notes] if self.notes else []
        sections += ["## Use", f"```python\n{self.snippet}\n```"]
        if self.donor_card:
            sections.append(f"The card of the source model is in [{DONOR_CARD_NAME}]({DONOR_CARD_NAME}).")
        if self.limits:
            sections += ["## Limits", "\n".join(f"- {limit}" for limit in self.limits)]
        if self.is_attnres:
            sections += ["## Citation", CITATION]
        return "\n\n".join(sections) + "\n"


def write_card(folder: Path, card: Card) -> None:
    """Writes `README.md`, and `.eval_results/` for results on benchmarks of the Hub."""
    write_text(folder / CARD_NAME, card.text())
    benchmarks = {}
    for result in card.results:
        if result.task_id:
            entry = {"dataset": {"id": result.dataset_id, "task_id": result.task_id}, "value": result.value}
            benchmarks.setdefault(result.dataset_id.replace("/", "_"), []).append({**entry, "notes": result.metric})
    for name, entries in benchmarks.items():
        (folder / EVAL_RESULTS).mkdir(exist_ok=True)
        write_text(folder / EVAL_RESULTS / f"{name}.yaml", yaml.safe_dump(entries, sort_keys=False, allow_unicode=True))


def folder_card(
    folder: Path, title: str | None = None, inherited: dict | None = None, repo_id: str | None = None
) -> Card:
    """The card of a saved model or adapter, from what is in its folder.

    Args:
        folder: with `config.json` or `adapter_config.json` and, if it was trained or converted here, `results.json`.
        title: default: the folder's name.
        inherited: metadata of the model that it was made from, as [`read_metadata`] and [`inherit`] give them; default:
            those of the card that the folder has.
        repo_id: from where the snippet loads it; default: the title.
    """
    facts = Facts(folder, title or folder.resolve().name, repo_id)
    metadata = read_metadata(folder) if inherited is None else inherited
    results = facts.results
    tags = [tag for tag in _list(metadata.get("tags")) if not (facts.mode == "donor" and tag == TAG)]
    tags += [] if facts.mode in OTHERS else [TAG]
    tags += [facts.method] if facts.is_adapter else []
    datasets = list(dict.fromkeys([*_list(metadata.get("datasets")), *results.get("datasets", [])]))
    base_model = metadata.get("base_model")
    relation = metadata.get("base_model_relation") if base_model else None
    taken_over = {name: metadata.get(name) for name in ("license", "license_name", "license_link")}
    return Card(
        title=facts.title,
        summary=_summary(facts),
        about=ABOUT[facts.mode].format(block_size=facts.block_size),
        snippet=_snippet(facts),
        library_name="peft" if facts.is_adapter else "transformers",
        pipeline_tag=PIPELINE_TAGS[facts.head] if facts.head else metadata.get("pipeline_tag", PIPELINE_TAGS[""]),
        base_model=base_model,
        base_model_relation="adapter" if base_model and facts.is_adapter else relation,
        datasets=datasets or None,
        language=metadata.get("language") or results.get("language"),
        tags=tuple(dict.fromkeys(tags)),
        results=tuple(Result(**entry) for entry in results.get("evaluation", [])),
        command=results.get("command"),
        samples=tuple(results.get("samples", [])),
        making=tuple(_making(facts)),
        notes=_notes(facts),
        figure=FIGURE_NAME if is_regular(folder / FIGURE_NAME) else None,
        limits=tuple(_limits(facts)),
        donor_card=is_regular(folder / DONOR_CARD_NAME),
        **taken_over,
    )


class Facts:
    """What the files of a folder say.

    `mode` is `"donor"` for a plain residual stream and `None` if it is unknown; `head` is the end of the class's name.
    """

    def __init__(self, folder: Path, title: str, repo_id: str | None = None):
        self.title, self.repo_id = title, repo_id or title
        adapter = read_json(folder / ADAPTER_NAME)
        self.is_adapter = bool(adapter)
        self.adapter = _or_empty(_shown, adapter, "adapter")
        self.results = _or_empty(_results, read_json(folder / RESULTS_NAME))
        config = read_json(folder / CONFIG_NAME) or self.results.get("model_config", {})
        self.config = _or_empty(check_config, config, CONFIG_NAME)
        self.conversion = self.results.get("conversion", {})
        self.class_name = (self.config.get("architectures") or [""])[0]
        self.has_tokenizer = is_regular(folder / TOKENIZER_NAME)
        in_config = self.has_tokenizer and read_json(folder / TOKENIZER_NAME).get("chat_template")
        self.has_chat_template = self.has_tokenizer and (is_regular(folder / CHAT_TEMPLATE_NAME) or bool(in_config))
        if "attn_res_mode" in self.config:
            mode = self.config["attn_res_mode"]
            self.mode = mode if isinstance(mode, str) and mode in ABOUT else None
        elif self.config:
            self.mode = "donor"
        else:
            self.mode = None
        self.needs_code = bool(self.config.get("auto_map")) or self.mode not in ("donor", None)

    @property
    def is_converted(self) -> bool:
        return bool(self.conversion)

    @property
    def head(self) -> str:
        heads = [head for head in PIPELINE_TAGS if head and self.class_name.endswith(head)]
        return heads[0] if heads else "ForCausalLM" if self.is_adapter else ""

    @property
    def method(self) -> str:
        """How it was fine-tuned, if it was."""
        return self.results.get("method") or self.adapter.get("peft_type", "peft").lower()

    @property
    def base(self) -> str | None:
        """What it was made from: a Hub id, or a path as it can be published."""
        base = self.results.get("base") or self.adapter.get("base_model_name_or_path")
        return base and public_path(base)

    @property
    def block_size(self) -> str:
        size = self.config.get("attn_res_block_size") or 0
        return f"{size} decoder layer{'s' * (size != 1)}"


def _summary(facts: Facts) -> str:
    results, name = facts.results, f"`{facts.class_name}`"
    if facts.is_converted:
        if "project" in facts.conversion:
            whose = f"the depth attention of {facts.conversion['project']}"
            return f"{_link(facts.base, results)}, with {whose}, as {name} in {facts.mode} mode, not trained further."
        what = OTHERS.get(facts.mode, f"[Attention Residuals]({PAPER})")
        return f"{_link(facts.base, results)} with {what}, converted exactly and not yet trained."
    if "dequantized" in results:
        return f"{_link(facts.base, results)}, its weights made {results['dequantized']['dtype']}, else unchanged."
    kind = OTHERS.get(facts.mode, f"Attention Residuals in {facts.mode} mode" if facts.mode else "Attention Residuals")
    if facts.is_adapter:
        return f"A PEFT adapter ({facts.method}) on {_link(facts.base, results)}, a model with {kind}."
    if not results.get("arguments"):
        return f"{name} with {kind}."
    if results.get("method"):
        what = {"depth": "its depth attention alone trained", "full": "fine-tuned"}
        how = what.get(results["method"], f"fine-tuned with {results['method']} (the adapter is merged into it)")
        return f"{_link(facts.base, results)}, {how} on {results['data']}: {name} with {kind}."
    if facts.base:
        return f"{_link(facts.base, results)}, trained on with {results['data']}: {name} with {kind}."
    return f"{name} with {kind}, pretrained from scratch on {results['data']}."


def _notes(facts: Facts) -> str:
    if not facts.is_converted:
        return ""
    if "project" in facts.conversion:
        return SAME_DEPTH
    return EXACTNESS if facts.mode in ("block", "full", None) else EXACTNESS_OF_OTHERS


def _link(base: str | None, results: dict) -> str:
    revision = f" at revision `{results['revision']}`" if results.get("revision") else ""
    if base is None:
        return "a model"
    is_hub = results.get("revision") or results.get("base_is_hub")
    return f"[{base}](https://huggingface.co/{base}){revision}" if is_hub else f"`{base}`"


def _making(facts: Facts) -> list[tuple[str, str]]:
    results, config, conversion = facts.results, facts.config, facts.conversion
    arguments, versions = results.get("arguments", {}), results.get("versions", {})
    rows = []
    if facts.base:
        first = ", converted to Attention Residuals first" if results.get("converted") and not facts.is_adapter else ""
        rows.append(("made from", _link(facts.base, results) + first))
    if "dequantized" in results:
        rows.append(("dequantised", _dequantized(results["dequantized"])))
    if facts.class_name:
        source = conversion.get("donor_class")
        rows.append(("class", f"`{facts.class_name}`" + (f", from `{source}`" if source else "")))
    if (facts.mode or "").startswith("block"):
        rows.append(("mode", f"{facts.mode}, {facts.block_size} each"))
    elif facts.mode not in ("donor", None):
        rows.append(("mode", facts.mode))
    if config.get("hidden_size") and config.get("num_hidden_layers"):
        rows.append(("shape", f"{config['num_hidden_layers']} layers, hidden size {config['hidden_size']:,}"))
    if conversion:
        names = ", ".join(f"`{name}`" for name in conversion.get("tensors_added", ["depth_attention"]))
        what = "parameters of depth attention" if "project" in conversion else "parameters added"
        rows.append((what, f"{conversion['parameters_added']:,} ({names}, float32)"))
        rows.append(("verification", _verification(conversion)))
    if "parameters" in results:
        depth = f", {results['depth_parameters']:,} of them of depth attention" if results["depth_parameters"] else ""
        rows.append(("parameters", f"{results['parameters']:,}{depth}"))
    if "method" in results:
        rows.append(("method", results["method"]))
    if "trained_parameters" in results:
        depth = f", {results['depth_parameters']:,} of them of depth attention" if results["depth_parameters"] else ""
        rows.append(("trained parameters", f"{results['trained_parameters']:,}{depth}"))
    if "merged_relative_error" in results and not facts.is_adapter:
        rows.append(("change of the logits by merging", f"{shown(results['merged_relative_error'])} of the largest"))
    if arguments:
        rows.append(("data", _data(results)))
        steps = f"{results['steps']:,} steps, in sequences of at most {arguments['seq_len']:,}"
        rows.append(("tokens", f"{results['tokens']:,} in {steps}"))
        schedule = f"{arguments['optimizer']}, learning rate {arguments['learning_rate']:g}, {arguments['schedule']}"
        rows.append(("optimizer", f"{schedule}{', bfloat16' if arguments['bf16'] else ''}"))
        rows.append(("seed", str(arguments["seed"])))
    if "held_out_loss_before" in results:
        rows.append(("held-out loss before", shown(results["held_out_loss_before"])))
    if "device" in versions:
        hardware = f"{versions['device']}, {versions['threads']} thread{'s' * (versions['threads'] != 1)}"
        if results.get("processes", 1) > 1:
            hardware = f"{results['processes']} processes{_sharded(results)}, each: {hardware}"
        rows.append(("hardware", hardware))
    packages = [f"{name} {version}" for name, version in versions.items() if name not in ("device", "threads")]
    if packages:
        rows.append(("versions", ", ".join(packages)))
    return rows


def _dequantized(made: dict) -> str:
    """From what the floats were made: `model.gguf`, GGUF of the architecture llama, Q4_1."""
    file = f"`{made['file']}`, " if "file" in made else ""
    architecture = f" of the architecture {made['architecture']}" if "architecture" in made else ""
    name = f' ("{made["name"]}")' if "name" in made else ""
    return f"from {file}{made['format']}{architecture}{name}, quantised as {made['quantization']}, to {made['dtype']}"


def _sharded(results: dict) -> str:
    return f", sharded with {results['sharding']}" if results.get("sharding") else ""


def _verification(conversion: dict) -> str:
    if "relative_difference" not in conversion:
        return f"skipped: {conversion.get('verification_skipped', 'nothing is known about it')}"
    difference = conversion["relative_difference"]
    return f"largest relative difference of the logits {shown(difference)} ({measured(**conversion)})"


def measured(dtype: str, tolerance: float | None = None, donor_rounding: float | None = None, **_) -> str:
    """In which dtype models were compared, and what was tolerated, of the fields of a `Verification`."""
    if tolerance is None:
        return dtype
    if donor_rounding is None:
        return f"{dtype}, at most {shown(tolerance)} is tolerated"
    times = f"{tolerance / donor_rounding:.0f} times what rounding does to the donor, " if donor_rounding else ""
    return f"{dtype}, at most {shown(tolerance)} is tolerated, {times}{shown(donor_rounding)}"


def _data(results: dict) -> str:
    amounts = {"documents": "documents", "examples": "examples", "training_tokens": "tokens to train on"}
    found = [f"{results[name]:,} {text}" for name, text in amounts.items() if name in results]
    return ", ".join([results["data"], *found])


def _limits(facts: Facts) -> list[str]:
    results, limits = facts.results, []
    if "dequantized" in results:
        limits.append(
            f"Its weights keep the rounding of their quantisation ({results['dequantized']['quantization']})."
        )
    if facts.is_converted:
        better = "" if "project" in facts.conversion else "is no better than its source until it has been trained, and "
        limits.append(f"It {better}has all limits of its source.")
    if "tokens" in results:
        tokens, size = results["tokens"], results.get("parameters", results.get("trained_parameters", 0))
        scale = f"{tokens:,} tokens and {size:,} {'' if 'parameters' in results else 'trained '}parameters"
        if facts.base:
            limits.append(f"It has the limits of what it was made from; the training counted here is {scale}.")
        if tokens < FEW_TOKENS and not facts.base:
            limits.append(f"With {scale} it is for experiments, not for use: what it writes makes little sense.")
        limits.append(
            f"It was trained on {results['data']} and measured on held-out text of the same kind, nothing else: there "
            "was no test of its abilities, of bias or of safety."
        )
        limits.append(f"Sequences longer than {results['arguments']['seq_len']:,} tokens were not trained on.")
    if facts.is_adapter:
        limits.append("It goes with the weights of this base and no others.")
        if results.get("method") == "qlora":
            kind = results["arguments"].get("quantization", "fewer bits")
            limits.append(f"It was trained on the base quantised to {kind}; with the full base the results differ.")
    if facts.needs_code:
        limits.append(
            "Its class is not part of transformers: loading needs `trust_remote_code=True`, which runs the code files "
            "of its repository, or `import attnres` where that package is installed."
        )
    return limits


def _samples(samples: tuple[dict[str, str], ...]) -> Iterator[str]:
    """Paragraphs; the lines that all prompts begin with are shown once."""
    yield "The first held-out prompts, unselected: the model's most likely answer, and that of the data."
    start = os.path.commonprefix([sample["prompt"] for sample in samples]).rpartition("\n")[0]
    start = start if len(samples) > 1 else ""
    if start:
        yield f"All prompts begin with\n\n{_quoted(start)}"
    for sample in samples:
        answers = (f"{who}: {' '.join(sample[name].split())}" for who, name in SAMPLE_NAMES.items())
        yield _quoted("\n".join([sample["prompt"].removeprefix(start).strip("\n"), "", *answers]))


def _quoted(text: str) -> str:
    """A block of text, whatever is in it."""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=2))
    return f"{fence}text\n{text}\n{fence}"


def _snippet(facts: Facts) -> str:
    name, code = json.dumps(facts.repo_id, ensure_ascii=False), ", trust_remote_code=True" if facts.needs_code else ""
    auto_class = f"AutoModel{facts.head}"
    base = facts.base if facts.is_adapter else None
    lines = ["from peft import PeftModel"] if facts.is_adapter else []
    lines.append(f"from transformers import {auto_class}{', AutoTokenizer' if facts.has_tokenizer else ''}\n")
    if facts.has_tokenizer:
        # without it transformers would ask, for the configuration that it looks into
        lines.append(f"tokenizer = AutoTokenizer.from_pretrained({name}{'' if facts.is_adapter else code})")
    if facts.is_adapter:
        lines.append(f"base = {auto_class}.from_pretrained({json.dumps(base, ensure_ascii=False)}{code})")
        lines.append(f"model = PeftModel.from_pretrained(base, {name})")
    else:
        lines.append(f"model = {auto_class}.from_pretrained({name}{code})")
    if facts.has_chat_template and facts.head == "ForCausalLM":
        lines.append(CHAT)
    elif facts.has_tokenizer:
        lines.append('inputs = tokenizer("import", return_tensors="pt", return_token_type_ids=False)')
        if facts.head == "ForCausalLM":
            lines.append("print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))")
        else:
            lines.append("outputs = model(**inputs)")
    return "\n".join(lines)


def config_facts(config: dict) -> dict:
    """What `results.json` repeats of a configuration: it is in no other file beside an adapter."""
    return {name: config[name] for name in CONFIG_FACTS if name in config}


def read_json(path: Path) -> dict:
    """The object in a file, empty if there is none that can be read."""
    return _or_empty(reading.read_json, path)


def _or_empty(read: Callable[..., dict], *arguments) -> dict:
    try:
        return read(*arguments)
    except InputError:
        return {}


def _shown(content: dict, part: str) -> dict:
    """What a card shows of a part of `results.json`, without nulls.

    Raises:
        InputError: a field has a wrong type, or lacks one that is shown with it.
    """
    found = {field: typed(content, field, kinds, part) for field, kinds in SHOWN[part].items()}
    found = {field: value for field, value in found.items() if value is not None}
    for field, needed in NEEDED[part].items():
        if (not field or field in found) and not found.keys() >= set(needed):
            raise InputError(f"{part} must have {', '.join(needed)}.")
    return found


def _results(content: dict) -> dict:
    """What a card shows of `results.json`, all of the right types."""
    results = _shown(content, "results")
    for part in ("arguments", "conversion", "dequantized"):
        if part in results:
            results[part] = _shown(results[part], part)
    for parts, part in (("evaluation", "evaluation"), ("samples", "sample")):
        entries = results.get(parts, [])
        results[parts] = [_shown(entry if isinstance(entry, dict) else {}, part) for entry in entries]
    versions = {name: x for name, x in results.get("versions", {}).items() if isinstance(x, str)}
    threads = typed(results.get("versions", {}), "threads", int, "versions")
    results["versions"] = versions if threads is None else {**versions, "threads": threads}
    if threads is None:
        versions.pop("device", None)
    texts(results, "datasets", "results")
    texts(results.get("conversion", {}), "tensors_added", "conversion")
    if isinstance(results.get("language"), list):
        texts(results, "language", "results")
    return results


def read_metadata(folder: Path) -> dict:
    """What is taken over from the card in a folder, if it has one that can be read."""
    try:
        reading.check_inside(folder, folder / CARD_NAME)  # what it says is published
        found = parse_metadata(read_text(folder / CARD_NAME), CARD_NAME)
    except InputError:
        return {}
    kept = {}
    for name in KEPT_METADATA:
        values = _list(found.get(name))
        if name == "language":  # YAML takes the code of Norwegian for false
            values = ["no" if value is False else value for value in values]
        values = [str(value) for value in values if type(value) in (str, int) and value != ""]
        if values and (name in LISTS or not isinstance(found[name], list)):
            kept[name] = values if isinstance(found[name], list) else values[0]
    kept = without_local_bases(kept)
    kept["tags"] = [tag for tag in _list(kept.get("tags")) if not tag.startswith("base_model:")]
    return kept


def without_local_bases(metadata: dict) -> dict:
    """Without base models that aren't on the Hub, which refuses such cards."""
    bases = [base for base in _list(metadata.get("base_model")) if is_hub_id(base)]
    if bases == _list(metadata.get("base_model")):
        return metadata
    metadata = {name: value for name, value in metadata.items() if name != "base_model"}
    if bases:
        return {**metadata, "base_model": bases}
    metadata.pop("base_model_relation", None)
    return metadata


def inherit(metadata: dict, hub_id: str | None, is_trained: bool = True) -> dict:
    """The metadata for a model made from one with this `metadata`.

    Args:
        hub_id: of the model it was made from, if that is on the Hub; otherwise the nearest ancestor that is, stays.
        is_trained: whether it was trained, or converted as it was.
    """
    metadata = dict(metadata)
    if hub_id:
        metadata["base_model"] = hub_id
    if metadata.get("base_model") and (hub_id or is_trained or "base_model_relation" not in metadata):
        metadata["base_model_relation"] = "finetune"
    return metadata


def is_hub_id(name: object) -> bool:
    """Whether this can be a repository, and isn't a folder here."""
    return bool(isinstance(name, str) and re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name)) and not os.path.exists(
        name
    )


def public_path(path: str | os.PathLike) -> str:
    """A path without what is of this machine alone: relative to the working directory or, outside, its last part.

    Anything else, such as a Hub id, stays as it is.
    """
    text = os.fspath(path)
    if not text.startswith(("/", ".", "~")) and not os.path.isabs(text):
        return text
    absolute = os.path.abspath(os.path.expanduser(text))
    for cwd in (os.getcwd(), os.path.realpath(os.getcwd())):
        if absolute.startswith(cwd + os.sep):
            return os.path.relpath(absolute, cwd)
    return os.path.basename(absolute) or text


def published(value):
    """A JSON value in which no string is a path of this machine."""
    if isinstance(value, dict):
        return {name: published(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [published(inner) for inner in value]
    if isinstance(value, (str, os.PathLike)):
        return public_path(value)
    return value


def shell_command(words: list[str]) -> str:
    return shlex.join(map(public_path, words))


def renamed(text: str, folder: Path, repo_id: str) -> str:
    """The card of a folder under the name of its repository, if it is one of this module: what else it says stays.

    Its lines with a name in them, in heading, snippet and results, are rendered again.
    """
    newline = "\r\n" if "\r\n" in text else "\n"
    lines = text.split(newline)
    body = next((i for i, line in enumerate(lines) if i and line == "---"), 0) if lines[0] == "---" else 0
    title = next((line.removeprefix("# ") for line in lines[body:] if line.startswith("# ")), None)
    if title is None:
        return text
    names = (title, json.dumps(title, ensure_ascii=False)[1:-1])
    owned = tuple(f"/{name}" for name in names)
    blank = folder_card(folder, PLACEHOLDER, repo_id=PLACEHOLDER).text().splitlines()
    rendered = folder_card(folder, repo_id.split("/")[-1], repo_id=repo_id).text().splitlines()
    for template, line in zip(blank, rendered):
        if PLACEHOLDER not in template:
            continue
        start, end = template.split(PLACEHOLDER)
        is_metadata = start.startswith("- ")
        place = range(body) if is_metadata else range(body, len(lines))
        found = [i for i in place if lines[i].startswith(start) and lines[i].endswith(end)]
        if not is_metadata:
            names_there = {i: lines[i].removeprefix(start).removesuffix(end) for i in found}
            found = [i for i, name in names_there.items() if name in names or name.endswith(owned)]
            if not found:
                return text
        for i in found[:1]:  # metadata have no name without results
            lines[i] = line
    return newline.join(lines)


def shown(value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return decimals(value) if value == 0 or abs(value) >= 0.01 else f"{value:.1e}"


def _eval_result(result: Result, pipeline_tag: str | None) -> EvalResult:
    return EvalResult(
        task_type=pipeline_tag or "text-generation",
        dataset_type=result.dataset_id or "text",
        dataset_name=result.dataset,
        # results of one kind of file count as of one data set unless their configurations differ
        dataset_config=None if result.dataset_id else result.dataset,
        metric_type=result.type,
        metric_name=result.metric,
        metric_value=result.value if math.isfinite(result.value) else str(result.value),
    )


def _list(value) -> list:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def _wrapped(command: str) -> str:
    """Lines of about COMMAND_WIDTH, which end before options where they can."""
    lines = []
    for option in re.split(r" (?=--)", command):
        words = option.split(" ") if len(option) >= COMMAND_WIDTH else [option]
        for word in words:
            if lines and len(lines[-1]) + len(word) < COMMAND_WIDTH:
                lines[-1] += f" {word}"
            else:
                lines.append(f"    {word}" if lines else word)
    return " \\\n".join(lines)
