# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""python scripts/evaluate_model.py outputs/run/donor/model outputs/run/block/model --output outputs/evaluation

Compares checkpoints: AttnRes models, donors, and folders of PEFT adapters. On text (`--data`): loss, perplexity and
bits per byte. On questions with choices (`--choices`): accuracy by length-normalised likelihood. On tasks of
EleutherAI's harness (`--lm-eval`): what they measure.

Each token of a document is counted once, predicted from at least --seq-len minus --stride tokens before it, or all
there are. The first token is predicted from the tokenizer's begin of text or, if it has none, its end of text; without
either, it counts as uniform over the vocabulary. Loss and perplexity are per token: models with different tokenizers
compare in bits per byte only.

Intervals hold 95 % of bootstrap resamples of the documents or questions, the same ones for all models, so that those of
differences are much narrower than those of values. They don't cover the randomness of training. `evaluation.json` and
`evaluation.md` appear in --output at the end; the last line printed is JSON. If a checkpoint fails, the others are
compared, and the script ends with an error.
"""

import argparse
import io
import itertools
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import datasets
import evaluate
import numpy as np
import torch
import transformers
from attnres_convert import InputError, reading
from attnres_convert.reading import first_line
from attnres_recipes.files import table, write_json, write_text
from model_loading import Checkpoint, check_contexts, load_checkpoint, open_checkpoint, short_names
from output_folder import output_folder
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from training_data import (
    STDLIB,
    DataError,
    check_tokens,
    checked_text,
    few_characters,
    held_out_rows,
    load_documents,
    load_rows,
    text_hash,
)
from training_options import batch, positive
from training_run import RunError, versions


METRICS = Path(__file__).parent / "evaluation"
LONGEST_DEFAULT = 1024  # tokens


@cache
def metric(name: str) -> evaluate.EvaluationModule:
    """A module of the folder `evaluation`; loading it needs no network."""
    return evaluate.load(str(METRICS / name), keep_in_memory=True)


@dataclass
class Metric:
    """A number with the documents' shares in it: `transform(sum(values) / sum(weights))`. Without them, it has no
    interval."""

    value: float
    values: np.ndarray | None = None  # (documents,)
    weights: np.ndarray | None = None  # (documents,)
    transform: Callable = np.asarray


@dataclass
class Question:
    prompt: str
    choices: list[str]
    answer: int  # index


@dataclass
class Span:
    """Tokens of which the last `scored` are predicted from those before them; `row` is the text they belong to."""

    row: int
    input_ids: list[int]
    scored: int


def windows(num_targets: int, seq_len: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Where to cut a text of `num_targets` tokens after the first: inputs `[start, end)`, which predict the tokens one
    further on, and how many of them, at the end, no window before has scored."""
    end = 0
    while end < num_targets:
        before, end = end, min(num_targets, end + stride if end else seq_len)
        yield max(0, end - seq_len), end, end - before


@torch.no_grad()
def span_nats(model, spans: list[Span], batch_size: int, description: str) -> np.ndarray:
    """The negative log-likelihood of the scored tokens of each span, in nats."""
    nats = np.zeros(len(spans))
    scored = [index for index, span in enumerate(spans) if span.scored]
    order = sorted(scored, key=lambda index: -len(spans[index].input_ids))
    bar = tqdm(total=len(order), desc=description, unit="window", disable=not sys.stderr.isatty())
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        length = len(spans[batch[0]].input_ids) - 1
        # what stands behind a text has no influence on it: no mask is needed
        rows = [spans[index].input_ids[:-1] + [0] * (length + 1 - len(spans[index].input_ids)) for index in batch]
        with reading.understood(f"{description}: the model fails", kind=RunError):
            logits = model(input_ids=torch.tensor(rows, device=model.device), use_cache=False).logits
        for index, row in zip(batch, logits):
            span = spans[index]
            end = len(span.input_ids) - 1
            targets = torch.tensor(span.input_ids[end + 1 - span.scored :], device=row.device)
            nats[index] = cross_entropy(row[end - span.scored : end].float(), targets, reduction="none").double().sum()
        bar.update(len(batch))
    bar.close()
    return nats


def first_context(tokenizer) -> list[int]:
    """What a text's first token is predicted from, if there is anything."""
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    return [token for token in ids if token is not None][:1]


def describe_first_context(tokenizer) -> str:
    tokens = tokenizer.convert_ids_to_tokens(first_context(tokenizer))
    return f"predicted from {tokens[0]}" if tokens else "uniform over the vocabulary"


def encode(tokenizer, texts: list[str], vocab_size: int, name: str) -> list[list[int]]:
    """The texts' own tokens; special tokens aren't scored."""
    options = {"add_special_tokens": False, "verbose": False, "return_attention_mask": False}
    tokens = [ids for group in few_characters(texts) for ids in tokenizer(group, **options)["input_ids"]]
    check_tokens(np.fromiter(itertools.chain(first_context(tokenizer), *tokens), int), vocab_size, tokenizer, name)
    return tokens


def sums_by_row(model, spans: list[Span], num_rows: int, args, description: str) -> np.ndarray:
    nats = span_nats(model, spans, args.batch_size, description)
    if not np.isfinite(nats).all():
        raise RunError(f"{description}: the loss is {nats[~np.isfinite(nats)][0]}; the model is broken.")
    return np.bincount(np.array([span.row for span in spans], int), weights=nats, minlength=num_rows)


def evaluate_texts(model, tokenizer, texts: list[str], args, name: str) -> tuple[dict, dict[str, Metric], int]:
    """Loss, perplexity and bits per byte of `texts`.

    Returns:
        What the module `text_loss` computes; its numbers with the documents' shares; a hash of the tokens.
    """
    context = first_context(tokenizer)
    tokens = encode(tokenizer, texts, model.config.vocab_size, "the text")
    spans = []
    for row, ids in enumerate(tokens):
        ids = context + ids
        for start, end, scored in windows(len(ids) - 1, args.seq_len, args.stride):
            spans.append(Span(row, ids[start : end + 1], scored))
    nats = sums_by_row(model, spans, len(texts), args, f"{name}, text")
    lengths = np.array([len(ids) for ids in tokens])
    if not lengths.any():
        raise RunError(f"{name}: its tokenizer makes no tokens of the text; change --data or --tokenizer.")
    if not context:
        nats = nats + np.log(model.config.vocab_size) * (lengths > 0)
    num_bytes = np.array([len(text.encode("utf-8", "surrogatepass")) for text in texts])
    results = metric("text_loss").compute(nats=nats, tokens=lengths, bytes=num_bytes)
    metrics = {
        "loss": Metric(results["loss"], nats, lengths),
        "perplexity": Metric(results["perplexity"], nats, lengths, np.exp),
        "bits_per_byte": Metric(results["bits_per_byte"], nats / np.log(2), num_bytes),
    }
    return results, metrics, hash(tuple(map(tuple, tokens)))


def evaluate_choices(model, tokenizer, questions: list[Question], args, name: str) -> tuple[dict, dict[str, Metric]]:
    """Accuracy of choosing the likeliest continuation of each prompt. Prompts that are too long lose their beginning.

    A token may hold the end of the prompt and the beginning of a choice: all choices of a question are scored from the
    first token on in which one of them differs from the prompt.
    """
    context = first_context(tokenizer)
    vocab_size = model.config.vocab_size
    prompts = encode(tokenizer, [question.prompt for question in questions], vocab_size, "--choices")
    spans, uniform, truncated = [], [], set()
    for row, (question, prompt) in enumerate(zip(questions, prompts)):
        wholes = [question.prompt + choice for choice in question.choices]
        wholes = encode(tokenizer, wholes, vocab_size, f"question {row + 1}")
        shared = min(len(os.path.commonprefix([prompt, whole[:-1]])) for whole in wholes)
        for whole in wholes:
            ids, scored = context + whole, len(whole) - shared
            if scored > args.seq_len:
                raise RunError(f"a choice of question {row + 1} has {scored} tokens, --seq-len {args.seq_len} at most.")
            if len(ids) > args.seq_len + 1:
                truncated.add(row)
            uniform.append(scored == len(ids))  # there is no token before the first one
            spans.append(Span(len(spans), ids[-args.seq_len - 1 :], scored - uniform[-1]))
    nats = sums_by_row(model, spans, len(spans), args, f"{name}, choices")
    nats = nats + np.log(model.config.vocab_size) * np.array(uniform)
    ends = np.cumsum([len(question.choices) for question in questions])[:-1]
    results = metric("choice_accuracy").compute(
        nats=[part.tolist() for part in np.split(nats, ends)],
        bytes=[[len(choice.strip().encode()) for choice in question.choices] for question in questions],
        answers=[question.answer for question in questions],
    )
    metrics = {}
    for key, correct in (("accuracy", "correct"), ("raw_accuracy", "raw_correct")):
        values = np.array(results.pop(correct))
        metrics[key] = Metric(results[key], values, np.ones(len(values)))
    return {**results, "truncated_questions": len(truncated)}, metrics


def lm_eval_tasks(args):
    """The harness's task manager, after a check that the tasks are known and their data are there."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise RunError("--lm-eval needs EleutherAI's harness: pip install '.[lm-eval]'.") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    folder = args.lm_eval_include
    if folder is not None and not folder.is_dir():
        raise RunError(f"--lm-eval-include {folder} is not a folder.")
    manager = TaskManager(include_path=folder, include_defaults=False) if folder else None
    if manager is None or not set(args.lm_eval) <= set(manager.all_tasks):
        manager = TaskManager(include_path=folder)  # reads thousands of files
    unknown = [name for name in args.lm_eval if name not in manager.all_tasks]
    if unknown:
        raise RunError(
            f"the harness has no task {', '.join(unknown)}; see `lm-eval ls tasks`, or give --lm-eval-include."
        )
    try:
        manager.load(args.lm_eval)
    except Exception as error:  # whatever a task's code and data raise
        raise RunError(f"--lm-eval {','.join(args.lm_eval)} doesn't load: {first_line(error)}.") from None
    return manager


def evaluate_lm_eval(model, tokenizer, manager, args, name: str) -> tuple[dict, dict[str, Metric]]:
    """Runs the harness; what it reports for each task, and each number of it with the documents' shares."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    try:
        harness = HFLM(pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=args.batch_size)
        # its progress bars have no switch
        with nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO()):
            run = lm_eval.simple_evaluate(
                harness,
                tasks=args.lm_eval,
                task_manager=manager,
                num_fewshot=args.lm_eval_fewshot,
                limit=args.lm_eval_limit,
                **dict.fromkeys(seeds, args.seed),
            )
    except Exception as error:  # whatever a task's code and this model raise
        raise RunError(f"{name}: --lm-eval {','.join(args.lm_eval)} fails: {first_line(error)}.") from None
    metrics = {}
    for task, result in run["results"].items():
        for key, value in result.items():
            measure, _, filter_name = key.partition(",")
            if not filter_name or measure.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            label = f"{task} {measure}" + (f" ({filter_name})" if filter_name != "none" else "")
            samples = [sample for sample in run["samples"].get(task, ()) if sample["filter"] == filter_name]
            samples.sort(key=lambda sample: sample["doc_id"])
            metrics[label] = harness_metric(float(value), [sample.get(measure) for sample in samples])
    return {"results": run["results"], "versions": run["versions"], "fewshot": run["n-shot"]}, metrics


def harness_metric(value: float, samples: list) -> Metric:
    """With the documents' shares if it is a mean of theirs, as accuracies are, or made of the quotient of sums of
    log-likelihoods and lengths, as perplexities are."""
    try:
        pairs = np.array([sample if isinstance(sample, (tuple, list)) else (sample, 1) for sample in samples], float)
    except (TypeError, ValueError):
        return Metric(value)
    if pairs.ndim == 2 and pairs.shape[1] == 2:
        values, weights = pairs.T
        for transform in (np.asarray, lambda x: np.exp(-x), lambda x: -x / np.log(2)):
            if np.isclose(transform(values.sum() / weights.sum()), value):
                return Metric(value, values, weights, transform)
    return Metric(value)


def resampled_ratios(values: np.ndarray, weights: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """`sum(values) / sum(weights)` over documents that are drawn with replacement, the same ones for each row.

    Args:
        values: `(models, documents)`.
        weights: `(models, documents)`.

    Returns:
        `(models, resamples)`.
    """
    generator = np.random.default_rng(seed)
    documents = values.shape[1]
    ratios = []
    for _ in range(resamples):
        counts = np.bincount(generator.integers(documents, size=documents), minlength=documents)
        with np.errstate(invalid="ignore"):
            ratios.append((values @ counts) / (weights @ counts))
    return np.stack(ratios, axis=1)


def interval(samples: np.ndarray) -> list[float]:
    samples = samples[~np.isnan(samples)]  # as those are that drew nothing but documents without tokens
    return np.percentile(samples, [2.5, 97.5]).tolist()


def with_intervals(metrics: dict[str, Metric], comparable: set[str], resamples: int, seed: int) -> dict[str, dict]:
    """One number of each model with its interval, and the difference to the first model where it is comparable.

    Args:
        metrics: by the name of the model, the first one first.
        comparable: the models for which a difference to the first one makes sense.
    """
    entries = {name: {"value": metric.value} for name, metric in metrics.items()}
    first = next(iter(metrics))
    for name in metrics:
        if name != first and name in comparable:
            entries[name]["difference"] = metrics[name].value - metrics[first].value
    if any(metric.values is None or len(metric.values) < 2 for metric in metrics.values()):
        return entries
    values = np.stack([metric.values for metric in metrics.values()])
    weights = np.stack([metric.weights for metric in metrics.values()])
    samples = metrics[first].transform(resampled_ratios(values, weights, resamples, seed))
    for entry, own in zip(entries.values(), samples):
        entry["interval"] = interval(own)
        if "difference" in entry:
            entry["difference_interval"] = interval(own - samples[0])
    return entries


def read_texts(args) -> list[str]:
    documents = load_documents(args.data, args.column, args.data_config, args.data_split, args.sample_by)
    texts = []
    for number, text in enumerate(documents[args.column], 1):
        if (text := checked_text(text, number, args.column)) and not text.isspace():
            texts.append(text)
    if args.held_out:
        hashes, sizes = (np.array([measure(text) for text in texts], np.int64) for measure in (text_hash, len))
        texts = [texts[index] for index in held_out_rows(hashes, args.held_out, sizes).nonzero()[0]]
    texts = texts[: args.max_documents]
    if not texts:
        which = f" of which {args.held_out:g} is held out" if args.held_out else ""
        raise RunError(f"{' '.join(args.data)} holds no text{which}; change --data or --held-out.")
    return texts


def read_questions(args) -> list[Question]:
    """The answer is an index, a label, a letter or the text of the choice."""
    columns = [args.question_column, args.choices_column, args.answer_column]
    option = "--question-column, --choices-column and --answer-column"
    rows, _ = load_rows([args.choices], columns, args.choices_config, args.choices_split, option=option)
    questions = []
    for number, row in enumerate(rows.select(range(min(len(rows), args.max_documents or len(rows)))), 1):
        prompt, choices, answer = (row[column] for column in columns)
        choices, labels = choices_and_labels(choices)
        if not isinstance(prompt, str) or not isinstance(choices, list) or len(choices) < 2:
            raise DataError(f"row {number} of {args.choices} is no question with a list of two choices or more.")
        if not all(isinstance(choice, str) and choice.strip() for choice in choices):
            raise DataError(f"row {number} of {args.choices} has a choice without text.")
        index = answer_index(answer, choices, labels)
        if index is None:
            raise DataError(f"the answer in row {number} of {args.choices}, {answer!r:.40}, is none of its choices.")
        prompt = args.prompt_format.replace("{question}", prompt)
        questions.append(Question(prompt, [args.choice_separator + choice for choice in choices], index))
    return questions


def choices_and_labels(choices) -> tuple[list | None, list[str]]:
    """Of a list of texts or numbers, a list of dictionaries with `text` and `label`, or a dictionary with these lists;
    the labels may be missing."""
    if isinstance(choices, list) and choices and all(isinstance(choice, dict) for choice in choices):
        choices = {key: [choice.get(key) for choice in choices] for key in ("text", "label")}
    labels = []
    if isinstance(choices, dict):
        choices, labels = choices.get("text"), choices.get("label") or []
    if isinstance(choices, list):
        choices = [str(choice) if isinstance(choice, (int, float)) else choice for choice in choices]
    return choices, [] if None in labels else list(map(str, labels))


def answer_index(answer, choices: list[str], labels: list[str]) -> int | None:
    if isinstance(answer, bool) or isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    text = str(answer).strip()
    plain = text.strip("().")  # "(B)" and "B."
    # a number is an index, unless there are labels
    for names in (labels[: len(choices)], choices if isinstance(answer, str) else []):
        for name in (answer, text, plain):
            if name in names:
                return names.index(name)
    if len(plain) == 1 and plain.isalpha():
        index = ord(plain.upper()) - ord("A")
    else:
        index = int(text) if text.isdecimal() else -1
    if not 0 <= index < len(choices):  # no index: one of the choices, where these are numbers
        index = choices.index(text) if text in choices else None
    return index


def fill_in_lengths(args, checkpoints: list[Checkpoint]):
    if args.seq_len is None:
        contexts = [checkpoint.context for checkpoint in checkpoints if checkpoint.context]
        args.seq_len = min([LONGEST_DEFAULT, *contexts])
    check_contexts(checkpoints, args.seq_len)
    args.stride = args.stride or max(1, args.seq_len // 2)
    if args.stride > args.seq_len:
        raise RunError(f"--stride {args.stride} is longer than --seq-len {args.seq_len}: tokens would be left out.")


def evaluate_checkpoint(
    checkpoint: Checkpoint, texts: list[str], questions: list[Question], manager, args, name: str
) -> tuple[dict, dict[str, Metric], int | None]:
    """What one checkpoint is and has; its numbers with the documents' shares; a hash of the tokens of `texts`."""
    model, tokenizer = load_checkpoint(checkpoint, args.dtype), checkpoint.tokenizer
    result = {"path": checkpoint.path, "base": checkpoint.base, "parameters": model.num_parameters()}
    result["mode"] = getattr(checkpoint.config, "attn_res_mode", "donor")
    result["dtype"] = str(model.dtype).removeprefix("torch.")
    metrics, tokens = {}, None
    if texts:
        result["first_token"] = describe_first_context(tokenizer)
        result["text"], found, tokens = evaluate_texts(model, tokenizer, texts, args, name)
        metrics |= found
    if questions:
        result["choices"], found = evaluate_choices(model, tokenizer, questions, args, name)
        metrics |= found
    if manager is not None:
        result["lm_eval"], found = evaluate_lm_eval(model, tokenizer, manager, args, name)
        metrics |= found
    return result, metrics, tokens


def evaluate_checkpoints(args) -> dict:
    """Evaluates one checkpoint after the other and returns what is also in `evaluation.json`: if some of several fail,
    the others, and why in `failures`.

    Raises:
        RunError, DataError: bad input, or all checkpoints fail; one line says what to do.
    """
    started = time.perf_counter()
    names = short_names(args.checkpoints)
    checkpoints = [open_checkpoint(path, args.base, args.tokenizer) for path in args.checkpoints]
    if args.base and all(checkpoint.adapter is None for checkpoint in checkpoints):
        raise RunError("--base is for adapters, and no checkpoint is one.")
    fill_in_lengths(args, checkpoints)
    texts = read_texts(args) if args.data else []
    questions = read_questions(args) if args.choices else []
    manager = lm_eval_tasks(args) if args.lm_eval else None
    results, metrics, tokens, failures = {}, {}, {}, {}
    for name, checkpoint in zip(names, checkpoints):
        try:
            results[name], own, tokens[name] = evaluate_checkpoint(checkpoint, texts, questions, manager, args, name)
        except InputError as error:  # what the others took may be hours
            failures[name] = str(error)
            continue
        for label, value in own.items():
            metrics.setdefault(label, {})[name] = value
    if not results:
        raise RunError(failures[names[0]])
    names = list(results)
    same_tokens = {name for name in names if tokens.get(name) == tokens.get(names[0])}
    for label, by_name in metrics.items():
        comparable = same_tokens if label in ("loss", "perplexity") else set(names)
        for name, entry in with_intervals(by_name, comparable, args.resamples, args.seed).items():
            results[name].setdefault("metrics", {})[label] = entry
    return {
        "checkpoints": results,
        "failures": failures,
        "different_tokens": sorted(set(names) - same_tokens),
        "seconds": time.perf_counter() - started,
        "arguments": json.loads(json.dumps(vars(args), default=str)),
        "versions": {**versions(), "evaluate": evaluate.__version__},
    }


def number(x: float, sign: str = "") -> str:
    """To four decimals or, where it is as large as perplexities may be, with fewer."""
    if abs(x) < 1000:
        return f"{x:{sign}.4f}"
    return f"{x:{sign},.0f}" if abs(x) < 1e9 else f"{x:{sign}.3e}"


def cells(entry: dict, key: str, sign: str = "") -> tuple[str, str]:
    """A value and its interval."""
    interval_key = "interval" if key == "value" else f"{key}_interval"
    numbers = [entry[key], *entry.get(interval_key, ())] if key in entry else []
    value, *bounds = [number(x, sign) for x in numbers] or "-"
    return value, f"{bounds[0]} to {bounds[1]}" if bounds else "-"


def report_table(results: dict[str, dict]) -> str:
    """A row for each measure of each checkpoint; with several of them, also the difference to the first one."""
    first = next(iter(results))
    several = len(results) > 1
    rows = [("measure", "checkpoint", "value", "95 % interval", f"difference to {first}", "95 % interval")]
    for label in results[first]["metrics"]:
        for name, result in results.items():
            entry = result["metrics"][label]
            rows.append((label.replace("_", " "), name, *cells(entry, "value"), *cells(entry, "difference", "+")))
    return table(rows if several else [row[:4] for row in rows])


def notes(evaluation: dict) -> list[str]:
    """What one has to know to read the table."""
    results, args = evaluation["checkpoints"], evaluation["arguments"]
    first = next(iter(results))
    lines = [
        f"Intervals: 95 % of {args['resamples']} bootstrap resamples of the documents or questions"
        + (", the same ones for all checkpoints." if len(results) > 1 else ".")
    ]
    for name, result in results.items():
        line = f"{name}: {result['mode']}, {result['parameters']:,} parameters, {result['dtype']}"
        if "text" in result:
            counts = "{documents:,} documents, {tokens:,} tokens, {bytes:,} bytes".format(**result["text"])
            line += f"; {counts}, the first token of a document is {result['first_token']}"
        lines.append(f"{line}.")
        if result.get("choices", {}).get("truncated_questions"):
            counts = "{truncated_questions} of {questions} questions".format(**result["choices"])
            lines.append(f"{name}: {counts} were longer than {args['seq_len']} tokens and lost their beginning.")
    if "text" in results[first]:
        share = f", the {args['held_out']:g} that is held out from training" if args["held_out"] else ""
        lines.append(
            f"Text: {' '.join(args['data'])}{share}; windows of {args['seq_len']} tokens, {args['stride']} apart."
        )
    lines += [f"Left out, as it fails: {message}" for message in evaluation["failures"].values()]
    if evaluation["different_tokens"]:
        others = ", ".join(evaluation["different_tokens"])
        lines.append(f"{others}: other tokens than {first}; compare bits per byte, not loss or perplexity.")
    return lines


def write_report(folder: Path, evaluation: dict, command: list[str]):
    try:
        write_json(folder / "evaluation.json", {**evaluation, "command": command})
        lines = "".join(f"- {line}\n" for line in notes(evaluation))
        write_text(folder / "evaluation.md", f"{report_table(evaluation['checkpoints'])}\n{lines}")
    except OSError as error:
        raise RunError(f"can't write to {folder}: {error.strerror}.") from None


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="evaluate_model.py",
        usage="%(prog)s CHECKPOINT [CHECKPOINT ...] --output FOLDER [options]; --help lists them",
        description=__doc__.split("\n\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: " + __doc__.split("\n\n", 1)[0],
    )
    add = parser.add_argument_group("models").add_argument
    add("checkpoints", nargs="+", help="folders or Hub ids of models, or folders of PEFT adapters; the others are "
        "compared with the first one")  # fmt: skip
    add("--base", help="base of the adapters, instead of the one that they name")
    add("--tokenizer", help="folder or Hub id; default: each checkpoint's own")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="default: as saved")
    add("--batch-size", type=batch, default=8, help="sequences per forward; default: 8")
    add("--seq-len", type=positive, help="tokens of context at most; default: the shortest context of the models, at "
        f"most {LONGEST_DEFAULT}")  # fmt: skip
    add = parser.add_argument_group("text: loss, perplexity, bits per byte").add_argument
    add("--data", nargs="+", help="stdlib (Python's own source, offline), files or folders of text, JSON lines or "
        "Parquet, or a Hub id; default: stdlib, if neither --choices nor --lm-eval is given")  # fmt: skip
    add("--data-config", help="configuration of the data set on the Hub")
    add("--data-split", default="train", help="split, also test[:1000] and the like; default: train")
    add("--column", default="text", help="column that holds the text; default: text")
    add("--sample-by", choices=("document", "paragraph", "line"), help="what a document is in text files; default: "
        "document (a file) if there are several files, else paragraph")  # fmt: skip
    add("--held-out", type=float, metavar="SHARE", help="only the documents that pretrain.py --held-out SHARE keeps "
        "from training; default: 0.05 of stdlib, all of other data")  # fmt: skip
    add("--max-documents", type=positive, help="documents, and questions, to evaluate at most; default: all")
    add("--stride", type=positive, help="tokens by which windows follow one another; default: half of --seq-len")
    add = parser.add_argument_group("questions: accuracy").add_argument
    add("--choices", metavar="DATA", help="file of JSON lines or Parquet, or Hub id: a question, a list of choices and "
        "the answer (index, letter, label or text) in each row")  # fmt: skip
    add("--choices-config", help="configuration of the data set on the Hub")
    add("--choices-split", default="train", help="default: train, which is all of a file")
    add("--question-column", default="question", help="default: question")
    add("--choices-column", default="choices", help="default: choices")
    add("--answer-column", default="answer", help="default: answer")
    add(
        "--prompt-format", default="{question}", help="for instance 'Question: {question} Answer:'; default: {question}"
    )
    add("--choice-separator", default=" ", help="between prompt and choice; default: a space")
    add = parser.add_argument_group("EleutherAI's harness (pip install '.[lm-eval]')").add_argument
    add("--lm-eval", metavar="TASKS", help="names of tasks, groups or tags, separated by commas")
    add("--lm-eval-include", type=Path, metavar="FOLDER", help="task files (YAML) of your own")
    add("--lm-eval-fewshot", type=int, metavar="N", help="examples in the prompt; default: as the task says")
    add("--lm-eval-limit", type=positive, metavar="N", help="documents of each task at most; default: all")
    add = parser.add_argument_group("results").add_argument
    add("--output", type=Path, required=True, help="folder for evaluation.json and evaluation.md")
    add("--resamples", type=positive, default=1000, help="of the bootstrap; default: 1000")
    add("--seed", type=int, default=0, help="of the bootstrap, and of the harness; default: 0")
    args = parser.parse_args(argv)
    args.lm_eval = [name.strip() for name in args.lm_eval.split(",")] if args.lm_eval else []
    if not (args.data or args.choices or args.lm_eval):
        args.data = [STDLIB]
    if args.held_out is None and args.data == [STDLIB]:
        args.held_out = 0.05
    if args.held_out is not None and not 0 < args.held_out < 1:
        parser.error("--held-out is a share of the documents, between 0 and 1")
    if "{question}" not in args.prompt_format:
        parser.error("--prompt-format needs {question}, where the question comes")
    if not 0 <= args.seed < 2**32:
        parser.error("--seed is a number from 0 to 4294967295")
    if os.path.isfile(args.output):
        parser.error(f"--output {args.output} is a file; give a folder")
    return args


def main(argv: list[str] | None = None):
    argv = sys.argv[1:] if argv is None else argv
    args = parse_arguments(argv)
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # of libraries
    try:
        names = ("evaluation.json", "evaluation.md")
        with reading.no_panic(), output_folder(args.output, "evaluate_model.py", {names[0]: names}):
            evaluation = evaluate_checkpoints(args)
            write_report(args.output, evaluation, ["evaluate_model.py", *argv])
    except InputError as error:
        raise SystemExit(f"evaluate_model: {error}") from None
    except KeyboardInterrupt:
        print("evaluate_model: interrupted; nothing was written.", file=sys.stderr)
        raise SystemExit(130) from None
    print(report_table(evaluation["checkpoints"]))
    print("\n".join(notes(evaluation)))
    summary = {name: {label: entry["value"] for label, entry in result["metrics"].items()} for name, result in
               evaluation["checkpoints"].items()}  # fmt: skip
    print(json.dumps({"output": str(args.output), "checkpoints": summary, "failures": evaluation["failures"]}))
    if evaluation["failures"]:
        raise SystemExit(f"evaluate_model: {'; '.join(evaluation['failures'].values())}")


if __name__ == "__main__":
    main()
