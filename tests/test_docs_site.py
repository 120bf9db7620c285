# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""The documentation site: it builds without a warning, needs nothing but itself, and its links lead somewhere."""

import http.server
import importlib
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from functools import partial
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from documents import headings


pytestmark = [
    pytest.mark.skipif(find_spec("material") is None, reason="needs the extra docs"),
    pytest.mark.timeout(300),
]
ROOT = Path(__file__).parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
# What a page loads by itself, by tag
LOADED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src"}


class Page(HTMLParser):
    """What a page of the site leads to, and what in it can be led to."""

    def __init__(self, file: Path):
        super().__init__()
        self.links, self.loaded, self.ids, self.headings = [], [], [], []
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if "id" in attributes:
            self.ids.append(attributes["id"])
            if re.fullmatch("h[1-6]", tag):
                self.headings.append(attributes["id"])
        if tag == "a" and "href" in attributes:
            self.links.append(attributes["href"])
        if tag in LOADED and LOADED[tag] in attributes and attributes.get("rel") != "canonical":
            self.loaded.append(attributes[LOADED[tag]])


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, str]:
    """The site, and what building it printed."""
    site = tmp_path_factory.mktemp("docs").resolve() / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True, timeout=250)
    assert done.returncode == 0, done.stderr
    return site, done.stderr


@pytest.fixture(scope="module")
def site(built) -> Path:
    return built[0]


@pytest.fixture(scope="module")
def pages(site) -> dict[Path, Page]:
    return {file: Page(file) for file in sorted(site.rglob("*.html")) if file.name != "404.html"}


def own_pages() -> list[str]:
    """The Markdown files of the repository; of what isn't committed, those that the site shows."""
    found = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=ROOT, text=True, capture_output=True,
    )  # fmt: skip
    if found.returncode:
        pytest.skip("needs git")
    return [name for name in found.stdout.splitlines() if (ROOT / name).exists()]


def place(name: str) -> str:
    """Where the page that a Markdown file becomes is."""
    path = Path(name.removeprefix("docs/"))
    if name == "README.md":
        return "index.html"
    if "/" not in name:
        return f"project/{path.stem.lower()}.html"
    return str(path.with_name("index.html") if path.stem == "README" else path.with_suffix(".html"))


def test_no_warnings(built):
    """Not even about what MkDocs takes for a matter of taste."""
    assert not re.search("warning|error|isn't there", built[1], re.IGNORECASE), built[1]


def test_links_lead_somewhere(site, pages):
    """Each link, picture, script and style of each page is a file of the site, and has the place that is named."""
    wrong, seen = [], 0
    for file, page in pages.items():
        for url in page.links + page.loaded:
            parts = urlsplit(url)
            if parts.scheme or parts.netloc:
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            target = target / "index.html" if target.is_dir() else target
            seen += 1
            is_there = target.is_file() and target.is_relative_to(site)
            if not is_there or parts.fragment and unquote(parts.fragment) not in pages[target].ids:
                wrong.append(f"{file.relative_to(site)}: {url}")
    assert seen > 3000 and not wrong, wrong


def test_nothing_is_loaded_from_elsewhere(site, pages):
    """Scripts, styles, fonts and pictures are files of the site."""
    loaded = [url for page in pages.values() for url in page.loaded]
    assert len(loaded) > 300 and [url for url in loaded if urlsplit(url).scheme not in ("", "data")] == []
    styles = [file.read_text(encoding="utf-8") for file in site.rglob("*.css")]
    assert len(styles) >= 3 and not any(re.search(r"url\([\"']?(https?:)?//|@import", style) for style in styles)


def test_no_link_leaves_for_the_repository(pages):
    """There is no address of it that a link could lead to."""
    elsewhere = Counter(url for page in pages.values() for url in page.links if urlsplit(url).netloc)
    assert "https://arxiv.org/abs/2603.15031" in elsewhere
    assert not [url for url in elsewhere if "attnres" in url.lower().replace("jon123boss/lr-attnres", "")]


def test_all_pages_are_there(pages, site):
    """Every Markdown file of the repository is a page, and so is every entry of the navigation."""
    shown = {file.relative_to(site).as_posix() for file in pages}
    names = own_pages()
    assert len(names) > 50 and {place(name) for name in names} <= shown
    assert len({place(name) for name in names}) == len(names)

    def entries(items):
        for item in items:
            value = next(iter(item.values())) if isinstance(item, dict) else item
            yield from entries(value) if isinstance(value, list) else [value]

    text = re.sub(r"!!python\S+", "", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    navigation = list(entries(yaml.safe_load(text)["nav"]))
    patterns = [entry for entry in navigation if "*" in entry]
    assert len(navigation) > 30 and all(any(ROOT.glob(pattern)) for pattern in patterns)
    assert {place(entry) for entry in navigation if "*" not in entry} <= shown
    listed = {path.relative_to(ROOT).as_posix() for pattern in patterns for path in ROOT.glob(pattern)} | {*navigation}
    assert [name for name in names if name not in listed and not name.startswith("results/")] == []


def test_headings_have_githubs_names(pages, site):
    """So that a link to one works in both."""
    seen = 0
    for name in own_pages():
        expected = headings((ROOT / name).read_text(encoding="utf-8"))
        ids = pages[site / place(name)].headings
        assert [heading for heading in expected if heading not in ids] == [], name
        seen += len(expected)
    assert seen > 150


SHAPE = {
    *["ul", "ol", "li", "table", "tr", "pre", "code", "blockquote", "h1", "h2", "h3", "h4", "img", "em", "strong", "hr"]
}


class Shape(HTMLParser):
    """The tags of a text, in their order, that say what is a list, a table or code."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.is_code = [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag in SHAPE and not self.is_code:
            self.tags.append(tag)
        self.is_code |= tag == "pre"

    def handle_endtag(self, tag):
        self.is_code &= tag != "pre"


def test_pages_have_the_shape_that_github_shows(site):
    """MkDocs has another Markdown, for which a list may need an empty line or a deeper indent."""
    markdown_it = pytest.importorskip("markdown_it")
    parser = markdown_it.MarkdownIt("commonmark", {"html": True}).enable("table")
    names = [name for name in own_pages() if not name.startswith("docs/reference/")]
    for name in names:
        text = re.sub(r"\A---\n.*?\n---\n", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.DOTALL)
        expected = Shape(parser.render(text)).tags
        article = re.search("<article.*?</article>", (site / place(name)).read_text(encoding="utf-8"), re.DOTALL)[0]
        found = Shape(article).tags
        assert found[0] == "h1" and found[expected[:1] != ["h1"] :] == expected, name


def exported() -> list[str]:
    return [name for package in ("attnres", "attnres_convert", "attnres_recipes")
        for name in importlib.import_module(package).__all__]  # fmt: skip


def test_reference_is_complete(pages, site):
    """What the packages export has an entry, or a place in the table of families."""
    ids = {id.rpartition(".")[2] for file, page in pages.items() for id in page.ids if file.parent.name == "reference"}
    text = (site / "reference" / "models.html").read_text(encoding="utf-8")
    table = re.search('id="families".*?</table>', text, re.DOTALL)[0]
    of_families = set(re.findall("<code>(AttnRes\\w+)</code>", table))
    names = exported()
    assert len(names) > 80 and [name for name in names if name not in ids | of_families] == []
    assert len(of_families) > 45 and not of_families - {*names}


def test_reference_reads_well(site):
    """Arguments are lists, names in brackets are links or plain, options and commands are those of the parsers."""
    texts = {file.stem: file.read_text(encoding="utf-8") for file in (site / "reference").glob("*.html")}
    assert len(texts) == 8
    for text in texts.values():
        raw = r"\[<code>|\[`|\*optional|<autoref|generated:|<p>(Args|Raises|Returns):|^::: "
        assert not re.search(raw, text, re.MULTILINE)
    fields = re.findall(r"<code>(attn_res_\w+)</code></b>", texts["configuration"])
    assert fields.count("attn_res_mode") == fields.count("attn_res_window") == 2  # of Llama's, and of all
    assert 'href="models.html#modeling_attnres.AttnResModel"><code>AttnResModel</code></a>' in texts["configuration"]
    assert "ceil(num_hidden_layers / 8)" in texts["configuration"]
    for option in ("--to-kimi-k3", "--depth-lr-scale", "--merge", "--lm-eval", "--max-new-tokens", "--port"):
        assert option in texts["commands"]
    assert texts["commands"].count("<pre>") >= 9 and ".py" not in re.findall("usage: .*", texts["commands"])[1]
    assert "<td><code>depth_lr_scale</code></td>" in texts["options"]


def test_front_matter_is_hidden(site):
    """Of a card, the metadata for the Hub; of a table alone, nothing is missing."""
    shown = (site / "model_cards" / "llama-1.3m" / "index.html").read_text(encoding="utf-8")
    assert (ROOT / "model_cards/llama-1.3m/README.md").read_text(encoding="utf-8").startswith("---\nlanguage: en\n")
    assert "<h1" in shown and not re.search("library_name|pipeline_tag|model-index", shown)
    table = (site / "results" / "from_scratch" / "comparison.html").read_text(encoding="utf-8")
    assert "<h1>from_scratch: comparison</h1>" in table and "<table>" in table


FRAME = """<!doctype html><iframe width="{width}" height="900" src="{page}"></iframe><script>
setInterval(() => {{
  const page = document.querySelector("iframe").contentDocument, root = page.documentElement;
  const found = page.readyState === "complete" && ({script});
  if (found) fetch("/found", {{method: "POST", body: JSON.stringify(found)}});
}}, 100);
</script>"""


@pytest.fixture
def seen_in(site, tmp_path):
    """What a script finds in a page in a window of some width, as soon as it finds something: an expression of `page`,
    the document, and `root`, its element."""
    found = queue.SimpleQueue()

    class Server(http.server.SimpleHTTPRequestHandler):
        def do_POST(self):  # noqa: N802
            found.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def do_GET(self):  # noqa: N802
            if self.path != "/frame.html":
                return super().do_GET()
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(frame.encode())

        def log_message(self, *arguments):
            pass

    def seen_in(page: str, width: int, script: str):
        nonlocal frame
        frame = FRAME.format(page=page, width=width, script=script)
        address = f"http://127.0.0.1:{server.server_port}/frame.html"
        command = [CHROMIUM, *QUIET.split(), "--window-size=1400,1000", f"--user-data-dir={tmp_path / 'user'}", address]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as browser:
            try:
                return found.get(timeout=60)
            finally:
                browser.terminate()

    frame = ""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Server, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield seen_in
        server.shutdown()


in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


@in_a_browser
@pytest.mark.parametrize(("page", "title"), [("index.html", "attnres"), ("guides/convert.html", "Convert")])
def test_page_in_a_browser(seen_in, page, title):
    """The title is seen, in the project's colours."""
    script = """{title: page.querySelector("h1").innerText, height: page.querySelector("h1").offsetHeight,
        bar: getComputedStyle(page.querySelector(".md-header")).backgroundColor}"""
    found = seen_in(page, 1200, script)
    assert title.lower() in found["title"].lower() and found["height"] > 20
    assert found["bar"] == "rgb(79, 58, 140)"


@in_a_browser
def test_search_in_a_browser(seen_in, site):
    """It runs in the page, and finds words where they are written."""
    script = """page.querySelector(".md-search-result__link") &&
        [...page.querySelectorAll(".md-search-result__link")].map(link => link.href)"""
    found = seen_in("index.html?q=null+source", 1200, script)
    texts = [(site / unquote(urlsplit(url).path)[1:]).read_text(encoding="utf-8") for url in found]
    assert any("null source" in text for text in texts)


@in_a_browser
@pytest.mark.parametrize("page", ["results/index.html", "speed.html", "reference/options.html", "families.html"])
def test_narrow_window(seen_in, page):
    """A table that is wider than the window scrolls by itself."""
    script = """page.querySelector("table") && {window: root.clientWidth, page: root.scrollWidth,
        table: Math.max(...[...page.querySelectorAll("table")].map(table => table.scrollWidth))}"""
    found = seen_in(page, 420, script)
    assert found["page"] <= found["window"] <= 420 < found["table"]
