# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""The server, as a process of its own, asked over HTTP by OpenAI's client: trained models of the zoo, with a chat
template. What it answers is what `generate` gives."""

import inspect
import shlex
import shutil
import subprocess
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import openai
import pytest
import torch
from attnres_commands import serve
from attnres_recipes.options import ServeOptions
from attnres_recipes.serving import taken_by
from peft import AutoPeftModelForCausalLM
from serve_process import Running, free_port
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cli.serve import Serve


ROOT = Path(__file__).parents[1]
ZOO = ROOT / "model_cards"
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turns here') }}{% endif %}"
    "{{ '# ' + m.role + ': ' + m.content + '\n' }}{% endfor %}# assistant:\n"
)
PROMPTS = ["import os", "def main():\n", "class Test", "    return self"]


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """A model that chats, alone and with continuous batching, and an adapter, which has no chat template."""
    folder = tmp_path_factory.mktemp("served")
    chat = folder / "chat"
    shutil.copytree(ZOO / "attnres-1.3m-block", chat)
    (chat / "chat_template.jinja").write_text(TEMPLATE)
    batching = ("--continuous-batching", "--cb-num-blocks=64", "--cb-block-size=32", "--cb-max-batch-tokens=64")
    started = {
        "chat": Running(str(chat)),
        "batching": Running(str(chat), batching),
        "adapter": Running("model_cards/attnres-1.3m-lora"),
    }
    with ExitStack() as stack:
        for server in started.values():
            stack.enter_context(server.start(ROOT, folder))
        for server in started.values():
            server.ready()
        yield started


@pytest.fixture(scope="module")
def reference(servers):
    """What `generate` gives: the text of an answer, and whether it ended by itself."""
    model = AutoModelForCausalLM.from_pretrained(servers["chat"].model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(servers["chat"].model)

    def answer(text: str, is_chat: bool = False, model=model, max_new_tokens: int = 24) -> str:
        if is_chat:
            messages = [{"role": "user", "content": text}]
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        else:
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
        tokens = model.generate(input_ids=ids, do_sample=False, max_new_tokens=max_new_tokens)[0, ids.shape[1] :]
        return tokenizer.decode(tokens, skip_special_tokens=True)

    return answer


def test_models(servers):
    """The model that is served is the one that is listed, and the start tells how to ask for it."""
    server = servers["chat"]
    assert [model.id for model in server.client.models.list()] == [server.model]
    curl = next(line for line in server.text.splitlines() if line.strip().startswith("curl"))
    answer = subprocess.run(shlex.split(curl), capture_output=True, text=True, timeout=60)
    assert '"role":"assistant"' in answer.stdout, answer


@pytest.mark.parametrize("name", ["chat", "batching"])
def test_chat(servers, reference, name):
    """A chat's answer is what `generate` gives after the template's tokens, and usage counts its tokens."""
    answer = servers[name].chat("import os")
    assert answer.choices[0].message.content == reference("import os", is_chat=True)
    assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == 24


@pytest.mark.parametrize("name", ["chat", "batching"])
def test_completions(servers, reference, name):
    """A completion's text is what `generate` gives, also of another length."""
    texts = [servers[name].complete(PROMPTS[1], length).choices[0].text for length in (5, 24)]
    assert texts == [reference(PROMPTS[1], max_new_tokens=length) for length in (5, 24)]
    assert texts[1].startswith(texts[0]) and texts[0] != texts[1]


@pytest.mark.parametrize("name", ["chat", "batching"])
def test_streaming(servers, name):
    """The pieces of a stream, several, are the text that comes without."""
    server = servers[name]
    pieces = [piece.choices[0].text for piece in server.complete(PROMPTS[0], stream=True)]
    assert len(pieces) > 3 and "".join(pieces) == server.complete(PROMPTS[0]).choices[0].text != ""
    pieces = [piece.choices[0].delta.content or "" for piece in server.chat(PROMPTS[2], stream=True)]
    assert len(pieces) > 3 and "".join(pieces) == server.chat(PROMPTS[2]).choices[0].message.content != ""


def test_continuous_batching(servers, reference):
    """Requests of different lengths at the same time get the texts that they get one by one."""
    lengths = [7, 12, 24, 17, 9, 21, 14, 24]
    jobs = list(zip(PROMPTS * 2, lengths))
    with ThreadPoolExecutor(len(jobs)) as pool:
        together = list(pool.map(lambda job: servers["batching"].complete(*job).choices[0].text, jobs))
    assert together == [servers["batching"].complete(*job).choices[0].text for job in jobs]
    assert together == [reference(prompt, max_new_tokens=length) for prompt, length in jobs]
    assert len(set(together)) == len(jobs)


def test_stop(servers, reference):
    """Generation ends with a stop string, which the text still has, as transformers' server does it."""
    whole = reference(PROMPTS[0])
    stop = whole[4:8]
    answer = servers["chat"].complete(PROMPTS[0], stop=[stop]).choices[0]
    assert answer.finish_reason == "stop" and answer.text == whole[: len(answer.text)] != whole
    assert answer.text.rfind(stop) > len(answer.text) - 2 * len(stop)


def test_adapter(servers, reference):
    """An adapter's folder is served on its base, and changes what that says; without a template it completes text."""
    server = servers["adapter"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        adapted = AutoPeftModelForCausalLM.from_pretrained(server.model, dtype=torch.float32).eval()
    expected = reference(PROMPTS[1], model=adapted)
    assert server.complete(PROMPTS[1]).choices[0].text == expected
    assert expected != reference(PROMPTS[1], model=adapted.unload())
    assert "has no chat template, so it completes text" in server.text
    with pytest.raises(openai.BadRequestError, match="no chat template: use /v1/completions"):
        server.chat("Hello")


def test_wrong_requests(servers):
    """Another model, which nobody loads, or what the template refuses, is an error of the request with a reason."""
    server = servers["chat"]
    with pytest.raises(openai.BadRequestError, match=f"Server is pinned to '{server.model}'"):
        server.client.completions.create(model=str(ZOO / "llama-1.3m"), prompt="a", max_tokens=1)
    with pytest.raises(openai.BadRequestError, match="no system turns here"):
        server.chat("", messages=[{"role": "user", "content": "a"}, {"role": "system", "content": "b"}])
    body = f'{{"model": "{ZOO / "llama-1.3m"}"}}'.encode()
    headers = {"Content-Type": "application/json"}
    asked = urllib.request.Request(f"http://127.0.0.1:{server.port}/load_model", body, headers)
    with urllib.request.urlopen(asked, timeout=60) as events:
        assert b"and no other model" in events.read()
    assert server.complete("a", 1).usage.completion_tokens == 1
    with pytest.raises(openai.APIConnectionError):
        Running(server.model).complete("a")


def test_system_turn_as_in_other_commands(servers):
    """A system's turn that the template rejects goes in front of the user's first one."""
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]
    answers = [servers["chat"].chat("", messages=turns), servers["chat"].chat("s\n\na")]
    assert len({answer.choices[0].message.content for answer in answers}) == 1
    assert len({answer.usage.prompt_tokens for answer in answers}) == 1


REFUSED = {
    "no folder": (["./absent"], "doesn't exist"),
    "no tokenizer": (["bare"], "give --tokenizer"),
    "port in use": (["chat", "--port", "{port}"], "choose another --port"),
    "no such host": (["chat", "--host", "256.0.0.1"], "can't listen at 256.0.0.1"),
    "no such attention": (["chat", "--attn-implementation", "loud"], "loud"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(servers, case, tmp_path, monkeypatch, capsys):
    """What can't be served ends with one line and an exit code, before or while the model is loaded."""
    arguments, message = REFUSED[case]
    shutil.copytree(servers["chat"].model, tmp_path / "chat")
    shutil.copytree(servers["chat"].model, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    monkeypatch.chdir(tmp_path)
    port = servers["chat"].port if case == "port in use" else free_port()
    words = [word.format(port=port) for word in arguments]
    before = set(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as ended:
        serve.main([*words, "--host", "127.0.0.1"] if "--host" not in words else words)
    assert ended.value.code.startswith("serve: ") and message in ended.value.code
    assert "\n" not in ended.value.code and set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "words", ["--port 0", "--port 70000", "--chat-template-kwargs [1]", "--chat-template-kwargs {"]
)
def test_wrong_options(words, capsys):
    with pytest.raises(SystemExit) as ended:
        serve.main(["model", *words.split()])
    assert ended.value.code == 2 and words.split()[0] in capsys.readouterr().err.splitlines()[-1]


def test_options_are_those_of_transformers():
    """Each option but those of loading has the name and the default of `transformers serve`."""
    options, names = ServeOptions(model="m"), inspect.signature(Serve).parameters
    taken = taken_by(Serve, options)
    assert vars(options).keys() - taken.keys() == {"model", "base", "tokenizer"}
    assert taken == {name: getattr(names[name].default, "value", names[name].default) for name in taken}


def test_interrupt(servers):
    """Ctrl-C ends each server, also one that batches, without a traceback. The last test: it ends them all."""
    codes = {name: server.interrupt() for name, server in servers.items()}
    assert codes == dict.fromkeys(servers, 0)
    for server in servers.values():
        ending = server.text.split("Shutting down")[1]
        assert "Traceback" not in ending and "Finished server process" in ending
