# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Comparison of checkpoints on text, questions with choices, and tasks of EleutherAI's harness.

Intervals hold 95 % of bootstrap resamples of the documents or questions, the same ones for all models.
"""

import io
import itertools
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import evaluate as evaluate_library
import numpy as np
import torch
from attnres_convert import InputError, reading
from attnres_convert.reading import first_line
from attnres_convert.writing import decimals, table, write_json, write_text
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from .data import check_tokens, checked_text, few_characters, held_out_rows, load_documents, load_rows, text_hash
from .folders import output_folder
from .loading import Checkpoint, check_contexts, load_checkpoint, open_checkpoint, short_names
from .options import EvaluateOptions, TextOptions
from .process import versions
from .resampling import interval, resampled_ratios


METRICS = Path(__file__).parent / "evaluation_modules"
SCRIPT = "evaluate_model.py"  # as which a report is known again
LONGEST_DEFAULT = 1024  # tokens


@cache
def metric(name: str) -> evaluate_library.EvaluationModule:
    """A module of the folder `evaluation_modules`; loading it needs no network."""
    return evaluate_library.load(str(METRICS / name), keep_in_memory=True)


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
        with reading.understood(f"{description}: the model fails"):
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


def sums_by_row(model, spans: list[Span], num_rows: int, batch_size: int, description: str) -> np.ndarray:
    nats = span_nats(model, spans, batch_size, description)
    if not np.isfinite(nats).all():
        raise InputError(f"{description}: the loss is {nats[~np.isfinite(nats)][0]}; the model is broken.")
    return np.bincount(np.array([span.row for span in spans], int), weights=nats, minlength=num_rows)


def evaluate_texts(
    model, tokenizer, texts: list[str], name: str, seq_len: int, stride: int, batch_size: int = 8
) -> tuple[dict, dict[str, Metric], int]:
    """Loss, perplexity and bits per byte of `texts`.

    Returns:
        What the module `text_loss` computes; its numbers with the documents' shares; a hash of the tokens.
    """
    context = first_context(tokenizer)
    tokens = encode(tokenizer, texts, model.config.vocab_size, "the text")
    spans = []
    for row, ids in enumerate(tokens):
        ids = context + ids
        for start, end, scored in windows(len(ids) - 1, seq_len, stride):
            spans.append(Span(row, ids[start : end + 1], scored))
    nats = sums_by_row(model, spans, len(texts), batch_size, f"{name}, text")
    lengths = np.array([len(ids) for ids in tokens])
    if not lengths.any():
        raise InputError(f"{name}: its tokenizer makes no tokens of the text; change --data or --tokenizer.")
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


def evaluate_choices(
    model, tokenizer, questions: list[Question], name: str, seq_len: int, batch_size: int = 8
) -> tuple[dict, dict[str, Metric]]:
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
            if scored > seq_len:
                raise InputError(f"a choice of question {row + 1} has {scored} tokens, --seq-len {seq_len} at most.")
            if len(ids) > seq_len + 1:
                truncated.add(row)
            uniform.append(scored == len(ids))  # there is no token before the first one
            spans.append(Span(len(spans), ids[-seq_len - 1 :], scored - uniform[-1]))
    nats = sums_by_row(model, spans, len(spans), batch_size, f"{name}, choices")
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


def lm_eval_tasks(tasks: list[str], folder: Path | None):
    """The harness's task manager, after a check that the tasks are known and their data are there."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise InputError("--lm-eval needs EleutherAI's harness: pip install 'attnres[lm-eval]'.") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if folder is not None and not folder.is_dir():
        raise InputError(f"--lm-eval-include {folder} is not a folder.")
    manager = TaskManager(include_path=folder, include_defaults=False) if folder else None
    if manager is None or not set(tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=folder)  # reads thousands of files
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown:
        raise InputError(
            f"the harness has no task {', '.join(unknown)}; see `lm-eval ls tasks`, or give --lm-eval-include."
        )
    try:
        manager.load(tasks)
    except Exception as error:  # whatever a task's code and data raise
        raise InputError(f"--lm-eval {','.join(tasks)} doesn't load: {first_line(error)}.") from None
    return manager


def evaluate_lm_eval(model, tokenizer, manager, options: EvaluateOptions, name: str) -> tuple[dict, dict[str, Metric]]:
    """Runs the harness; what it reports for each task, and each number of it with the documents' shares."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    try:
        harness = HFLM(pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=options.batch_size)
        # its progress bars have no switch
        with nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO()):
            run = lm_eval.simple_evaluate(
                harness,
                tasks=options.tasks,
                task_manager=manager,
                num_fewshot=options.lm_eval_fewshot,
                limit=options.lm_eval_limit,
                **dict.fromkeys(seeds, options.seed),
            )
    except Exception as error:  # whatever a task's code and this model raise
        raise InputError(f"{name}: --lm-eval {','.join(options.tasks)} fails: {first_line(error)}.") from None
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


def read_texts(options: TextOptions) -> list[str]:
    documents = load_documents(options.data, options.column, options.data_config, options.data_split, options.sample_by)
    texts = []
    for number, text in enumerate(documents[options.column], 1):
        if (text := checked_text(text, number, options.column)) and not text.isspace():
            texts.append(text)
    if options.held_out:
        hashes, sizes = (np.array([measure(text) for text in texts], np.int64) for measure in (text_hash, len))
        texts = [texts[index] for index in held_out_rows(hashes, options.held_out, sizes).nonzero()[0]]
    texts = texts[: options.max_documents]
    if not texts:
        which = f" of which {options.held_out:g} is held out" if options.held_out else ""
        raise InputError(f"{' '.join(options.data)} holds no text{which}; change --data or --held-out.")
    return texts


def read_questions(options: EvaluateOptions) -> list[Question]:
    """The answer is an index, a label, a letter or the text of the choice."""
    columns = [options.question_column, options.choices_column, options.answer_column]
    option = "--question-column, --choices-column and --answer-column"
    rows, _ = load_rows([options.choices], columns, options.choices_config, options.choices_split, option=option)
    questions = []
    for number, row in enumerate(rows.select(range(min(len(rows), options.max_documents or len(rows)))), 1):
        prompt, choices, answer = (row[column] for column in columns)
        choices, labels = choices_and_labels(choices)
        if not isinstance(prompt, str) or not isinstance(choices, list) or len(choices) < 2:
            raise InputError(f"row {number} of {options.choices} is no question with a list of two choices or more.")
        if not all(isinstance(choice, str) and choice.strip() for choice in choices):
            raise InputError(f"row {number} of {options.choices} has a choice without text.")
        index = answer_index(answer, choices, labels)
        if index is None:
            raise InputError(
                f"the answer in row {number} of {options.choices}, {answer!r:.40}, is none of its choices."
            )
        prompt = options.prompt_format.replace("{question}", prompt)
        questions.append(Question(prompt, [options.choice_separator + choice for choice in choices], index))
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


def with_lengths(options: EvaluateOptions, checkpoints: list[Checkpoint]) -> EvaluateOptions:
    """With the lengths of windows filled in."""
    contexts = [checkpoint.context for checkpoint in checkpoints if checkpoint.context]
    seq_len = options.seq_len or min([LONGEST_DEFAULT, *contexts])
    check_contexts(checkpoints, seq_len)
    stride = options.stride or max(1, seq_len // 2)
    if stride > seq_len:
        raise InputError(f"--stride {stride} is longer than --seq-len {seq_len}: tokens would be left out.")
    return replace(options, seq_len=seq_len, stride=stride)


def evaluate_checkpoint(
    checkpoint: Checkpoint, texts: list[str], questions: list[Question], manager, options: EvaluateOptions, name: str
) -> tuple[dict, dict[str, Metric], int | None]:
    """What one checkpoint is and has; its numbers with the documents' shares; a hash of the tokens of `texts`."""
    model, tokenizer = load_checkpoint(checkpoint, options.dtype), checkpoint.tokenizer
    result = {"path": checkpoint.path, "base": checkpoint.base, "parameters": model.num_parameters()}
    result["mode"] = getattr(checkpoint.config, "attn_res_mode", "donor")
    result["dtype"] = str(model.dtype).removeprefix("torch.")
    metrics, tokens, seq_len, batch_size = {}, None, options.seq_len, options.batch_size
    if texts:
        result["first_token"] = describe_first_context(tokenizer)
        result["text"], found, tokens = evaluate_texts(
            model, tokenizer, texts, name, seq_len, options.stride, batch_size
        )
        metrics |= found
    if questions:
        result["choices"], found = evaluate_choices(model, tokenizer, questions, name, seq_len, batch_size)
        metrics |= found
    if manager is not None:
        result["lm_eval"], found = evaluate_lm_eval(model, tokenizer, manager, options, name)
        metrics |= found
    return result, metrics, tokens


def evaluate_checkpoints(options: EvaluateOptions) -> dict:
    """Evaluates one checkpoint after the other and returns what is also in `evaluation.json`: if some of several fail,
    the others, and why in `failures`.

    Raises:
        InputError: as [`evaluate`].
    """
    started = time.perf_counter()
    names = short_names(options.checkpoints)
    checkpoints = [open_checkpoint(path, options.base, options.tokenizer) for path in options.checkpoints]
    if options.base and all(checkpoint.adapter is None for checkpoint in checkpoints):
        raise InputError("--base is for adapters, and no checkpoint is one.")
    options = with_lengths(options, checkpoints)
    texts = read_texts(options) if options.data else []
    questions = read_questions(options) if options.choices else []
    manager = lm_eval_tasks(options.tasks, options.lm_eval_include) if options.tasks else None
    results, metrics, tokens, failures = {}, {}, {}, {}
    for name, checkpoint in zip(names, checkpoints):
        try:
            results[name], own, tokens[name] = evaluate_checkpoint(checkpoint, texts, questions, manager, options, name)
        except InputError as error:  # what the others took may be hours
            failures[name] = str(error)
            continue
        for label, value in own.items():
            metrics.setdefault(label, {})[name] = value
    if not results:
        raise InputError(failures[names[0]])
    names = list(results)
    same_tokens = {name for name in names if tokens.get(name) == tokens.get(names[0])}
    for label, by_name in metrics.items():
        comparable = same_tokens if label in ("loss", "perplexity") else set(names)
        for name, entry in with_intervals(by_name, comparable, options.resamples, options.seed).items():
            results[name].setdefault("metrics", {})[label] = entry
    return {
        "checkpoints": results,
        "failures": failures,
        "different_tokens": sorted(set(names) - same_tokens),
        "seconds": time.perf_counter() - started,
        "arguments": json.loads(json.dumps(vars(options), default=str)),
        "versions": {**versions(), "evaluate": evaluate_library.__version__},
    }


def number(x: float, sign: str = "") -> str:
    """To four decimals or, where it is as large as perplexities may be, with fewer."""
    if abs(x) < 1000:
        return decimals(x, sign=sign)
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
        raise InputError(f"can't write to {folder}: {error.strerror}.") from None


def evaluate(options: EvaluateOptions) -> dict:
    """Evaluates one checkpoint after the other, writes `evaluation.json` and `evaluation.md`, and returns what is in
    the first. If some of several fail, the others are in it, and why in `failures`.

    Raises:
        InputError: bad input, or all checkpoints fail; one line says what to do.
    """
    names = ("evaluation.json", "evaluation.md")
    with output_folder(options.output, SCRIPT, {names[0]: names}):
        evaluation = evaluate_checkpoints(options)
        write_report(options.output, evaluation, [SCRIPT, *options.words()])
    return evaluation
