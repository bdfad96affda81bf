"""The report of a checkpoint: what the page shows, and how a browser draws it."""

import json
import re
import shutil
import subprocess
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from helpers.checkpoints import change_record, pruned
from helpers.command_line import run_cap

from optimum_cap.checkpoint.pictures import heat_map, sparsity_picture
from optimum_cap.evaluation.results import AccuracyResult, Answer, Evaluation, Transcript
from optimum_cap.publishing import add_results, write_html_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
PROBE = """<script>
const style = getComputedStyle(document.body);
parent.document.title = JSON.stringify({
  overflow: document.documentElement.scrollWidth - window.innerWidth,
  width: window.innerWidth,
  background: style.backgroundColor,
  color: style.color,
  headings: [...document.querySelectorAll("h2")].map((each) => each.textContent),
  pictures: [...document.querySelectorAll("svg")].map((each) => each.getBoundingClientRect().width),
  smallest: Math.min(...[...document.querySelectorAll("td, p, dd, svg text")].map(
    (each) => parseFloat(getComputedStyle(each).fontSize))),
});
</script>"""


def answers(right: str, response: str) -> AccuracyResult:
    items = tuple(Answer(str(n), mark == "1", "1", 4, False) for n, mark in enumerate(right))
    return AccuracyResult(items, 0, 8, {}, transcripts=(Transcript("0", "1 < 2 & 3?", response),))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pruned().save_pretrained(tmp_path / "model")
    sites = [
        {
            "site": f"model.layers.{layer}.{name}",
            "kind": kind,
            "layer": layer,
            "zeros": 1,
            "total": 4,
            "divergence": 0.1 * (layer + 1),
            "standard_error": None,
        }
        for layer in range(2)
        for name, kind in (("self_attn.o_proj", "attention"), ("mlp.down_proj", "mlp"))
    ]
    scores = [
        {
            "site": "model.layers.0.self_attn.o_proj",
            "unit": head,
            "layer": 0,
            "score": 0.01 * head - 0.02,
            "standard_error": 0.1,
            "importance": 1.0,
        }
        for head in range(4)
    ]
    change_record(tmp_path / "model", sensitivities=sites, scores=scores)
    return tmp_path / "model"


def with_results(folder: Path) -> None:
    pair = (
        Evaluation(name, {"gsm8k": answers(right, f"<b>{name}</b> says 3")}, {}, {}, 0.0)
        for name, right in (("pruned", "10"), ("dense", "11"))
    )
    add_results(folder, *pair)


class _Page(HTMLParser):
    """Collects what is not closed, what is loaded, and the text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "link", "img", "br", "rect"):
            self.open.append(tag)
        self.loaded += [f"{k}={v}" for k, v in attributes if k in ("src", "href")]

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        while tag == "rect" and self.open[-1] != tag:
            return
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_whole_and_loads_nothing(folder: Path, tmp_path: Path) -> None:
    with_results(folder)
    write_html_report(str(folder), tmp_path / "report.html")
    page = _Page()
    page.feed((tmp_path / "report.html").read_text())
    assert page.open == []
    assert page.loaded == []
    for shown in (
        "model",
        "-50.0 points",
        "1 < 2 & 3?",
        "<b>pruned</b> says 3",
        "Sparsity by layer and projection",
        "Sensitivity of each site",
        "Causal scores of attention heads",
        "attention, layer 1: 0.2",
        "head 3, layer 0: +0.0100",
        "num_samples",
        '"calibration"',
    ):
        assert shown in page.text, shown
    assert str(tmp_path) not in page.text


def test_text_of_a_record_cannot_become_markup(folder: Path, tmp_path: Path) -> None:
    odd = "<script>alert(1)</script>\x1b"
    change_record(
        folder,
        base_model=f"./{odd}",
        versions={odd: odd},
        calibration={"sources": [{"name": odd}], "digests": []},
    )
    write_html_report(str(folder), tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "<script" not in text
    assert "\x1b" not in text
    assert "&lt;script&gt;" in text


def test_the_same_checkpoint_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    for name in ("a.html", "b.html"):
        write_html_report(str(folder), tmp_path / name)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_the_command_writes_the_page_and_refuses_what_it_cannot(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def cap(*arguments: object) -> tuple[int, str, str]:
        return run_cap(monkeypatch, capfd, ["report", *arguments])

    file = tmp_path / "report.html"
    status, out, _ = cap(folder, "-o", file)
    assert (status, out) == (0, f"saved         {file}\n")
    for arguments, message in (
        ([folder, "-o", tmp_path / "report.pdf"], "must end in .html"),
        ([folder, "-o", tmp_path / "no" / "report.html"], "does not exist: create it first"),
    ):
        status, _, error = cap(*arguments)
        assert status == 2
        assert message in error
    status, _, error = cap(tmp_path, "-o", file)
    assert status == 1
    assert "is not a CAP checkpoint" in error


def test_a_picture_shows_each_value_and_its_scale() -> None:
    svg = sparsity_picture(pruned().pruning_record.matrices)
    assert svg.count("<title>") == 1 + len(pruned().pruning_record.matrices)
    one = heat_map(
        {(0, 0): 0.5}, rows=["a<b"], columns=["0"], title="t", form="{:.1%}", column_label="layer"
    )
    assert "a&lt;b, layer 0: 50.0%" in one
    logarithmic = heat_map(
        {(0, column): value for column, value in enumerate((0.0, 0.01, 0.1, 1.0))},
        rows=["a"],
        columns=list("0123"),
        title="t",
        form="{:g}",
        column_label="layer",
        logarithmic=True,
    )
    fills = re.findall(r'fill="(#\w{6})"><title>', logarithmic)
    assert fills == ["#440154", "#440154", "#21918c", "#fde725"]


def look_at(file: Path, folder: Path, width: int, *flags: str) -> dict[str, Any]:
    """Open a page in a browser, and return what the probe sees there.

    It is opened in a frame, because windows have a least width, which is that of no phone.
    """
    assert BROWSER is not None
    page = folder / "probed.html"
    framed = escape(file.read_text().replace("</body>", f"{PROBE}</body>"))
    page.write_text(
        '<!doctype html><meta name="color-scheme" content="light dark">'
        f'<iframe width="{width}" height="800" style="border: 0" srcdoc="{framed}"></iframe>'
    )
    done = subprocess.run(
        [
            *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"),
            *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
            *("--disable-sync", f"--user-data-dir={folder / 'profile'}", "--dump-dom", *flags),
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    title = re.search(r"<title>(\{.*?\})</title>", done.stdout, re.DOTALL)
    assert title is not None, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(title[1].replace("&amp;", "&"))
    return found


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason=f"needs a browser: one of {', '.join(BROWSERS)}")
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_draws_the_page_at_phone_and_desk_width(
    dark: bool, folder: Path, tmp_path: Path
) -> None:
    with_results(folder)
    write_html_report(str(folder), tmp_path / "report.html")
    theme = [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    for width in (400, 1200):
        seen = look_at(tmp_path / "report.html", tmp_path, width, *theme)
        assert seen["width"] == width
        assert seen["overflow"] <= 0, "the page scrolls sideways"
        assert seen["smallest"] >= 12
        assert len(seen["pictures"]) == 3
        assert min(seen["pictures"]) > 100
        assert "Results" in seen["headings"]
        colors = (seen["background"], seen["color"])
        expected = (
            ("rgb(13, 17, 23)", "rgb(230, 237, 243)")
            if dark
            else (
                "rgb(255, 255, 255)",
                "rgb(31, 35, 40)",
            )
        )
        assert colors == expected


def test_a_repository_in_the_cache_needs_no_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = tmp_path / "models--org--model"
    commit = "1" * 40
    pruned().save_pretrained(cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    write_html_report("org/model", tmp_path / "report.html")
    assert "No results were added" in (tmp_path / "report.html").read_text()
