"""The report: asks no network, fits screens and paper, every picture says what it shows."""

import asyncio
import base64
import json
import re
import shutil
import subprocess

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from tornado.httpclient import AsyncHTTPClient
from tornado.websocket import websocket_connect

from study import report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome",
                                                "google-chrome"))), None)  # fmt: skip
DOT = base64.b64encode(
    bytes.fromhex(
        "89504e470d0a1a0a0000000d4948445200000001000000010806000000"
        "1f15c4890000000d49444154789c6360606060000000050001a5f64540"
        "0000000049454e44ae426082"
    )
).decode()
FONT = "x" * 40


def page(folder, *cells, name="quick"):
    """The report of a notebook with these cells."""
    executed = folder / "report.ipynb"
    nbformat.write(new_notebook(cells=list(cells)), executed)
    target = folder / "results" / name / "report.html"
    target.parent.mkdir(parents=True, exist_ok=True)
    report.report(executed, target)
    return target


def shown(**data):
    return new_code_cell("secret = 1", outputs=[new_output("display_data", data=data)])


def table(columns=30, rows=40):
    cells = "".join(f"<td>{FONT[:12]}</td>" for _ in range(columns))
    return f"<details><summary>long</summary><table>{f'<tr>{cells}</tr>' * rows}</table></details>"


@pytest.fixture
def written(tmp_path):
    return page(
        tmp_path,
        new_markdown_cell("# Is it <so>?\n\nSee [three](03-pruning.ipynb)."),
        new_markdown_cell("## First & last\n\nWhat the dot *shows*."),
        shown(**{"image/png": DOT, "text/plain": "<Figure>"}),
        shown(**{"text/html": table(), "text/plain": "table"}),
        shown(**{"text/html": '<p><a href="../results/quick/removal.csv">all</a></p>'}),
        new_markdown_cell("## Change this"),
        shown(**{"image/png": DOT, "text/plain": "<Figure>"}),
        new_markdown_cell("## Second\n\n" + "unbroken" * 60),
    )


def test_it_has_title_contents_and_no_code(written):
    text = written.read_text()
    assert "<title>Is it &lt;so&gt;?</title>" in text or "<title>Is it ?</title>" in text
    links = re.findall(r'<li><a href="#(\w+)">(.*?)</a>', text)
    assert [said for _, said in links] == ["First &amp; last", "Second"]
    assert all(f'id="{anchor}"' in text for anchor, _ in links)
    assert "secret" not in text and "¶" not in text and "&#182;" not in text


def test_it_asks_no_network_and_its_links_lead_to_files(written):
    text = written.read_text()
    assert not re.findall(r"<script|<link|@import|src=\"(?!data:)|url\(", text)
    assert 'href="removal.csv"' in text and 'href="../../notebooks/03-pruning.ipynb"' in text


def test_pictures_say_what_they_show(written):
    (said,) = re.findall(r'<img alt="(.*?)"', written.read_text())
    assert said == "Figure 1, First &amp; last: What the dot shows."


def test_a_file_that_nobody_can_send_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "MOST", 100)
    with pytest.raises(ValueError, match="more than 100"):
        page(tmp_path, new_markdown_cell("# One"))
    with pytest.raises(ValueError, match="no heading"):
        page(tmp_path, new_markdown_cell("One"))


async def looked_at(path, port, screens):
    """By width and media: how much wider the content is than the page; errors of the console."""
    client = AsyncHTTPClient()
    for _ in range(100):
        try:
            told = await client.fetch(f"http://127.0.0.1:{port}/json/list")
            break
        except OSError:
            await asyncio.sleep(0.1)
    target = next(t for t in json.loads(told.body) if t["type"] == "page")
    socket = await websocket_connect(target["webSocketDebuggerUrl"])
    errors, counter = [], iter(range(1, 1000))

    async def ask(method, **parameters):
        number = next(counter)
        await socket.write_message(
            json.dumps({"id": number, "method": method, "params": parameters})
        )
        while True:
            answer = json.loads(await socket.read_message())
            if answer.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                errors.append(answer["params"])
            if answer.get("id") == number:
                return answer["result"]

    for domain in ("Page", "Runtime", "Log"):
        await ask(f"{domain}.enable")
    await ask("Page.navigate", url=path.as_uri())
    await asyncio.sleep(1)
    found = {}
    for width, media, scheme in screens:
        await ask("Emulation.setDeviceMetricsOverride", width=width, height=900,
                  deviceScaleFactor=1, mobile=False)  # fmt: skip
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        await ask("Emulation.setEmulatedMedia", media=media, features=features)
        said = await ask(
            "Runtime.evaluate",
            returnByValue=True,
            expression="""(() => {
            document.querySelectorAll('details').forEach(d => d.open = true);
            const page = document.documentElement;
            return [page.scrollWidth - page.clientWidth, getComputedStyle(document.body)
              .backgroundColor, [...document.images].every(i => i.alt && i.naturalWidth)]})()""",
        )
        found[width, media, scheme] = said["result"]["value"]
    socket.close()
    return found, errors


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_it_fits_wide_and_narrow_light_dark_and_paper(written, tmp_path):
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0",
               f"--user-data-dir={tmp_path / 'browser'}", "about:blank"]  # fmt: skip
    browser = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        port = next(m[1] for line in browser.stderr if (m := re.search(r"127.0.0.1:(\d+)/", line)))
        screens = [(w, m, s) for w in (1400, 400) for m, s in (("screen", "light"),
                                                               ("screen", "dark"))]  # fmt: skip
        screens.append((680, "print", "light"))  # A4 between its margins, in CSS pixels
        found, errors = asyncio.run(looked_at(written, port, screens))
    finally:
        browser.terminate()
        browser.wait()
        browser.stderr.close()
    assert not errors
    assert all(wider <= 0 and pictures for wider, _, pictures in found.values()), found
    colours = {key: colour for key, (_, colour, _) in found.items()}
    assert colours[1400, "screen", "dark"] != colours[1400, "screen", "light"]
    assert colours[680, "print", "light"] == colours[1400, "screen", "light"]
