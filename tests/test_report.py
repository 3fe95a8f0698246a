"""The report: every number followed back to its file, what is missing said, and the page seen."""

import html
import itertools
import json
import math
import re
import shutil
import statistics
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from random_models import BASE, model_folder

from eval.ablate.command import main as ablate
from eval.ablate.staircase import TECHNIQUES, staircase
from eval.report.command import main as report
from eval.report.document import Code, Heading, Paragraph, Picture, Section, Table, write_report
from eval.report.evidence import repetition
from eval.score import main as score
from jllama.cli.terminal import command_line
from jllama.folders.json_files import read_json_lines, write_json_lines
from jllama.folders.run import GENERATIONS
from train.lora import main as train

pytestmark = pytest.mark.integration

PLANNED = Path(__file__).parents[1] / "docs" / "results" / "ablation-llama-2-7b-a100-40gb"
SECTIONS = ["At a glance", "Beside the reference", "The techniques", "Parameters", "Memory",
            "Gradient checkpointing", "Loss", "Scores", "Prompts", "Data", "Settings",
            "How to reproduce"]  # fmt: skip
FILES = ["run.json", "config.yaml", "metrics.jsonl", "score.json", "generations.jsonl"]
RECORDED = [{"prompt": "Explain why a given topic is important. Environmental protection",
             "report_tuned_answer": "It <b>matters</b> | a lot."}]  # fmt: skip

EARLIER = {"average_loss_per_epoch": [1.5, 1.25, 1.125], "total_parameters": 6_747_639_808,
           "trainable_parameters": 8_388_608, "gpu_memory_mib": {"used": 40402, "total": 40960},
           "settings": {"lora_rank": 16, "learning_rate": 5e-5, "val_size": 4},
           "notes": ["Its rows were <200>."]}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run with its report: everything there is, from a tiny model."""
    place = tmp_path_factory.mktemp("place")
    model_folder(place, BASE)
    rows = [{"prompt": f"Say {i}.", "completion": str(i)} for i in range(24)]
    (place / "rows.json").write_text(json.dumps(rows))
    (place / "answers.json").write_text(json.dumps(RECORDED))
    (place / "losses.json").write_text(json.dumps(EARLIER))
    train([
        "--model", str(place / "model"), "--data", str(place / "rows.json"), "--epochs", "2",
        "--output-dir", str(place / "run"), "--val-size", "4", "--prompt-style", "report",
        "--ffn-bias",
    ])  # fmt: skip
    ablate([
        "--model", str(place / "model"), "--data", str(place / "rows.json"), "--precision", "fp32",
        "--accumulation", "1", "--remat", "none,block", "--tune", "lora", "--steps", "2",
        "--repeats", "1", "--val-size", "4", "--accuracy-steps", "2", "--seeds", "2",
        "--output", str(place / "ablation"),
    ])  # fmt: skip
    report(flags(place))
    return place


def flags(place, *more):
    return ["--run", str(place / "run"), "--ablation", str(place / "ablation"), str(PLANNED),
            "--reference", str(place / "answers.json"), str(place / "losses.json"),
            *more]  # fmt: skip


class Page(HTMLParser):
    """Headings, `<data>` elements, and the text of table cells outside of these."""

    def __init__(self, html):
        super().__init__()
        self.headings, self.data, self.bare, self._open = [], [], {}, []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "link", "br", "use", "path"):
            self._open.append(tag)
        if tag == "data":
            self.data.append([dict(attributes), ""])

    def handle_endtag(self, tag):
        if tag in self._open:
            while self._open.pop() != tag:
                pass

    def handle_data(self, text):
        if self._open and self._open[-1] == "h2":
            self.headings.append(text)
        if self._open and self._open[-1] == "data":
            self.data[-1][1] += text
        elif "td" in self._open and self.headings:
            self.bare.setdefault(self.headings[-1], []).append(text)


@pytest.fixture(scope="module")
def page(made):
    return Page((made / "run" / "report.html").read_text())


def stored(run, file, path):
    """What stands at a place, read with nothing of the project."""
    text = (run / file).read_text()
    if file.endswith(".jsonl"):
        found = [json.loads(line) for line in text.split("\n")[:-1]]
    else:
        found = json.loads(text) if file.endswith(".json") else yaml.safe_load(text)
    if path[0] == "*":
        return [line[path[1]] for line in found if line.get(path[1]) is not None]
    for step in path:
        found = found[step]
    return found


def follow(run, source):
    """A figure, computed again from its sources."""
    if "file" in source:
        return stored(run, source["file"], source["path"])
    values = [follow(run, each) for each in source["of"]]
    first, *others = values
    match source["operation"]:
        case "percent":
            return first / others[0] * 100
        case "difference":
            return first - sum(others)
        case "change in percent":
            return (others[0] / first - 1) * 100
        case "hundredfold":
            return first * 100
        case "MiB":
            return first / 1024 / 1024
        case "sum":
            return sum(first)
        case "total":
            return sum(values)
        case "max":
            return max(first)
        case "mean":
            return sum(values) / len(values)
        case "range":
            return max(values) - min(values)
        case "median":
            return statistics.median(first)
        case "length":
            return len(first)
        case "exact answers":
            return sum(c and a == b.strip() for a, b, c in zip(*values, strict=True))
        case "repetition":
            runs = ["-".join(map(str, first[i : i + 4])) for i in range(len(first) - 3)]
            return 100 - 100 * len(set(runs)) / len(runs) if runs else 0
        case "feed-forward biases":
            layers, hidden, dim = values
            return layers * (hidden + hidden + dim)
    raise AssertionError(source)


def test_every_number_is_found_again_where_it_says_it_stands(made, page):
    assert len(page.data) > 150
    for attributes, text in page.data:
        source = json.loads(attributes["data-source"])
        value = follow(made / "run", source)
        assert float(attributes["value"]) == pytest.approx(value, rel=1e-12), source
        shown = text.replace(",", "").lstrip("+")
        last = 0.5 * 10.0 ** -len(shown.partition(".")[2]) if "e" not in shown else 1e-9
        scaled = (value, 1000 * value, 1e-9 * value)  # as it is, s in ms, operations in 10^9
        assert any(abs(float(shown) - x) <= 1.001 * max(last, 1e-4 * abs(x)) for x in scaled), text


def test_no_number_stands_outside_of_what_can_be_followed(page):
    assert page.headings == SECTIONS
    for section in ("Parameters", "Memory", "Gradient checkpointing", "Loss", "Scores", "Data"):
        assert not re.search(r"\d", "".join(page.bare[section])), section


def test_the_report_says_what_was_trained(made, page):
    html = (made / "run" / "report.html").read_text()
    markdown = (made / "run" / "report.md").read_text()
    lines = [json.loads(x) for x in (made / "run" / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if "epoch_loss" in line:
            assert f">{line['epoch_loss']:.4f}</data>" in html
            assert f"| {line['epoch_loss']:.4f} |" in markdown
    assert ">1.2500</data>" in html  # the reference's second epoch
    assert "It &lt;b&gt;matters&lt;/b&gt; | a lot." in html
    assert "It \\<b\\>matters\\</b\\> \\| a lot." in markdown
    assert "biases" in html  # --ffn-bias explains its count
    assert "one micro-batch" in html.lower() or "micro-batch" in html
    assert str(made) not in html  # nobody's folders but the last two names
    for name in re.findall(r"\((report-\S+\.svg)\)", markdown):
        assert (made / "run" / name).read_text().startswith("<svg")
    assert not re.search(r'(src|href)="(?!#|data:)', html)  # asks for nothing


def test_the_reference_stands_beside_the_run(made, page, tmp_path):
    """Its parameters, memory and losses; only settings that differ; its notes."""
    text = (made / "run" / "report.md").read_text()
    section = text[text.index("## Beside the reference") : text.index("## The techniques")]
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            for line in section.splitlines() if line[:1] == "|"]  # fmt: skip
    found = {row[0]: row[1:] for row in rows}
    trained = json.loads((made / "run" / "run.json").read_text())
    assert found["parameters, trainable"] == [
        "8,388,608",
        f"{trained['parameters']['trainable']:,}",
    ]
    assert found["parameters, total"][0] == "6,747,639,808"
    assert found["memory at the peak, MiB"][0] == "40,402"
    assert found["of it used, percent"][0] == "98.6"
    assert found["training loss of epoch 2"][0] == "1.2500"
    assert found["training loss of epoch 3"] == ["1.1250", ""]  # this run has two
    assert found["learning\\_rate"] == ["5e-05", "0.0002"]
    assert "lora\\_rank" not in found  # the same in both
    assert "Its rows were \\<200\\>." in section
    run = shutil.copytree(made / "run", tmp_path / "run")
    report(["--run", str(run), "--only-read", "--reference", "original"])
    text = (run / "report.md").read_text()
    assert "| 1.3251 |" in text
    assert "were read from nvidia-smi" in text
    report(["--run", str(run), "--only-read"])
    assert "Beside the reference" not in (run / "report.md").read_text()


def test_a_report_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    sections = [Section("One", [Paragraph(["a"]), Picture("loss", "<svg></svg>", "a curve")])]
    write_report(tmp_path, "first", sections)
    names = ["report-loss.svg", "report.html", "report.md"]
    before = {name: (tmp_path / name).read_bytes() for name in names}
    write = Path.write_bytes

    def full(path, content):
        if path.name == "report.md.new":
            write(path, content[:10])
            raise OSError(28, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        write_report(tmp_path, "second", sections)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_report_shows_control_characters_and_quotes_commands(tmp_path):
    command = command_line("report", "--run", "my run\n\x1b; rm x")
    blocks = [Paragraph(["a\x1b[2J\u202e"]), Code(command), Heading("\x9b"),
              Table(["h"], [["\x07"]])]  # fmt: skip
    write_report(tmp_path, "t\x1b", [Section("One", blocks)])
    for name in ("report.html", "report.md"):
        text = (tmp_path / name).read_text()
        assert not set(text) & {"\x1b", "\x9b", "\x07", "\u202e"}
        assert r"$'my run\x0a\x1b; rm x'" in html.unescape(text)


def test_repetition_counts_runs_that_stood_before():
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(20)
    assert repetition([1, 2, 3, 4, 5]) == 0
    assert repetition([]) == 0
    assert repetition([7] * 13) == pytest.approx(90)


def copied(made, tmp_path):
    for name in ("run", "ablation", "model"):
        shutil.copytree(made / name, tmp_path / name)
    for name in ("answers.json", "losses.json", "rows.json"):
        shutil.copy(made / name, tmp_path / name)
    (tmp_path / "run" / "report.html").unlink()
    return tmp_path


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named_or_refused_never_made_up(name, made, tmp_path, capsys):
    place = copied(made, tmp_path)
    (place / "run" / name).unlink()
    if name in ("run.json", "config.yaml"):
        with pytest.raises(SystemExit) as ended:
            report(flags(place, "--only-read"))
        assert ended.value.code == 2
        assert "expected a run folder" in capsys.readouterr().err
        return
    report(flags(place, "--only-read"))
    html = (place / "run" / "report.html").read_text()
    assert f"Missing: {name} is not there." in html
    assert f'"file": "{name}"' not in html.replace("&#34;", '"')  # no figure claims to be from it


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["half", "noise", "emptied", "a list", "letters"])
def test_a_damaged_file_is_refused_or_said_to_be_wrong(name, damage, made, tmp_path, capsys):
    place = copied(made, tmp_path)
    file = place / "run" / name
    text = file.read_text()
    file.write_bytes({
        "half": text[: len(text) // 2].encode(),
        "noise": b"\x00\xff" + text.encode()[2:],
        "emptied": b"",
        "a list": b"[1, 2]",
        "letters": re.sub(r"(?<=: )-?[0-9.e-]+", '"x"', text).encode(),
    }[damage])  # fmt: skip
    code = 0
    try:
        report(flags(place, "--only-read"))
    except SystemExit as ended:
        code = ended.code
    if code:
        assert code == 2
        said = capsys.readouterr().err
        assert str(file) in said
        assert "Traceback" not in said
        assert not (place / "run" / "report.html").exists()
        return
    for attributes, _ in Page((place / "run" / "report.html").read_text()).data:
        value = follow(place / "run", json.loads(attributes["data-source"]))
        assert math.isclose(float(attributes["value"]), value, rel_tol=1e-9)
    assert "Missing: " in (place / "run" / "report.html").read_text()


@pytest.mark.parametrize("field", ["prompt", "base", "base_ids", "base_stopped"])
def test_a_generation_of_another_type_is_named(field, made, tmp_path, capsys):
    place = copied(made, tmp_path)
    file = place / "run" / GENERATIONS
    lines = [line | {field: 1.5} for line in read_json_lines(file).values]
    write_json_lines(file, lines)  # with right check sums
    with pytest.raises(SystemExit) as ended:
        report(flags(place, "--only-read"))
    assert ended.value.code == 2
    assert f"{file}: 0, {field} is 1.5" in capsys.readouterr().err


def test_only_scores_of_this_adapter_are_shown_and_parts_are_called_so(made, tmp_path, capsys):
    place = copied(made, tmp_path)
    run = place / "run"
    assert json.loads((run / "score.json").read_text())["part"] == "held-out"
    score(["--run", str(run), "--limit", "3", "--exact-tokens", "8"])
    assert "the first 3 held-out rows" in capsys.readouterr().out
    report(flags(place, "--only-read"))
    text = " ".join((run / "report.md").read_text().split())
    assert text.count("only the first 3 rows held out of") == 2  # the first screen, and Scores
    adapter = run / "adapter" / "adapter_model.safetensors"
    adapter.write_bytes(adapter.read_bytes()[:-1] + b"!")
    report(flags(place, "--only-read"))
    html = (run / "report.html").read_text()
    assert "Missing: score.json is of another adapter than adapter/." in html
    assert "exact, share" not in html


def test_the_stairs_go_from_no_technique_to_all_and_each_is_one_pair_of_cells():
    cells = read_json_lines(PLANNED / "cells.jsonl").values
    stairs = staircase(cells)
    axes = ("precision", "accumulation", "remat", "tune")
    assert [stair.technique for stair in stairs] == [TECHNIQUES[axis] for axis in axes]
    assert [cells[stairs[0].before][axis] for axis in axes] == ["fp32", 1, "none", "full"]
    assert [cells[stairs[-1].after][axis] for axis in axes] == ["bf16", 8, "block", "lora"]
    for axis, stair in zip(axes, stairs, strict=True):
        before, after = cells[stair.before], cells[stair.after]
        assert {a for a in axes if before[a] != after[a]} == {axis}
    assert all(b.after == a.before for b, a in itertools.pairwise(stairs))
    assert staircase([cell for cell in cells if cell["reference"]]) == []


def test_a_run_that_was_killed_is_reported_as_far_as_it_came(made, tmp_path):
    place = copied(made, tmp_path)
    lines = (place / "run" / "metrics.jsonl").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if "epoch_loss" in line)
    text = "\n".join(lines[: first + 1]) + '\n{"step": 9, "lo'
    (place / "run" / "metrics.jsonl").write_text(text)
    report(flags(place, "--only-read"))
    html = (place / "run" / "report.html").read_text()
    assert "over 1 epochs" in html
    assert "Missing: metrics.jsonl ends within a line" in html
    assert re.search("Not all of the .*>2</data> epochs have ended", html)
    (place / "run" / "metrics.jsonl").write_text(lines[0] + "\n")
    report(flags(place, "--only-read"))
    assert "no epoch has ended" in (place / "run" / "report.html").read_text()


def test_wrong_arguments_are_refused(made, tmp_path, capsys):
    (tmp_path / "x.json").write_text("{}")
    for arguments, message in (
        (["--run", str(tmp_path / "none")], "no run folder"),
        (["--run", str(tmp_path)], "expected a run folder"),
        (["--run", str(made / "run"), "--only-read", "--reference", str(tmp_path / "x.json")],
         "neither a list of recorded answers"),
        (["--run", str(made / "run"), "--only-read", "--reference", "none.json"], "none.json"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as ended:
            report(arguments)
        assert ended.value.code == 2
        assert message in capsys.readouterr().err


@pytest.mark.real
@pytest.mark.parametrize("rows", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_the_original_rows_on_a_real_model(assets, tmp_path, rows):
    from convert.from_meta import main as convert

    original = json.loads((assets / "alpaca" / "alpaca_data_200.json").read_text())
    (tmp_path / "rows.json").write_text(json.dumps(original[:rows]))
    convert([str(assets / "stories260K-meta"), str(tmp_path / "model")])
    train([
        "--config", "train/recipes/report.yaml", "--model", str(tmp_path / "model"),
        "--data", str(tmp_path / "rows.json"), "--val-size", str(rows // 10),
        "--max-seq-len", "512", "--skip-bad-rows", "200", "--output-dir", str(tmp_path / "run"),
    ])  # fmt: skip
    given = assets.parent / "report"
    report(["--run", str(tmp_path / "run"), "--reference", str(given / "prompts.json"),
            str(given / "figures.json")])  # fmt: skip
    html = (tmp_path / "run" / "report.html").read_text()
    page = Page(html)
    for loss in json.loads((given / "figures.json").read_text())["average_loss_per_epoch"]:
        assert f">{loss:.4f}</data>" in html
    sources = [json.loads(attributes["data-source"]) for attributes, _ in page.data]
    # Of each epoch beside the reference, and in the table of losses.
    assert sum(source.get("path", [0])[-1] == "epoch_loss" for source in sources) == 2 * 5
    held_out = [source for source in sources if source.get("path", [0])[-1] == "eval_loss"]
    assert len(held_out) == 2 + 6  # before and after on the first screen, and the table
    prompts = json.loads((given / "prompts.json").read_text())
    assert len(prompts) == 8
    shown = " ".join("".join(page.bare["Prompts"]).split())
    for row in prompts:
        for name, text in row.items():
            if name.endswith("_answer"):
                assert " ".join(text.split())[:200] in shown


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    driver, chrome = shutil.which("chromedriver"), shutil.which("chromium")
    if not driver or not chrome:
        pytest.skip("no chromium and chromedriver on this machine")
    options = webdriver.ChromeOptions()
    options.binary_location = chrome
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
                 "--disable-background-networking", "--disable-component-update"):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(driver)
    found = webdriver.Chrome(options=options, service=service)
    yield found
    found.quit()


def contrast(one, other):
    """Of two colours as CSS writes them, by WCAG 2."""

    def luminance(colour):
        parts = [int(x) / 255 for x in re.findall(r"\d+", colour)[:3]]
        red, green, blue = (
            x / 12.92 if x <= 0.03928 else ((x + 0.055) / 1.055) ** 2.4 for x in parts
        )
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("width", [1280, 768, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_looks_right_in_a_browser(made, browser, width, scheme):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    browser.get(f"file://{made / 'run' / 'report.html'}")
    seen = browser.execute_script("""
        const box = x => x.getBoundingClientRect();
        const all = x => [...document.querySelectorAll(x)];
        const ground = x => {
          for (; x; x = x.parentElement) {
            const found = getComputedStyle(x).backgroundColor;
            if (!found.endsWith(", 0)")) return found;
          }
        };
        const cards = all(".cards dd b").map(x => [x.textContent, box(x).bottom]);
        const folds = all("summary").map(x => { x.focus(); return document.activeElement === x; });
        for (const fold of all("details")) fold.open = true;
        return {
          cards, folds,
          headings: all("h2").map(x => x.textContent),
          levels: all("h1, h2, h3").map(x => +x.tagName[1]),
          pictures: all("figure svg").map(x => [box(x).width, box(x).height, box(x).right]),
          labels: all("figure").map(x => x.getAttribute("aria-label")),
          overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
          cut: all("table.wide").filter(x => box(x).width > box(x.parentNode).width + 1).length,
          colours: all("p, td, th, a, b, small, dt, summary, .better, .worse, figcaption").map(
            x => [getComputedStyle(x).color, ground(x)]),
        }""")
    assert seen["headings"] == SECTIONS
    assert len(seen["pictures"]) == 6
    assert all(w > 200 and h > 50 and right <= width for w, h, right in seen["pictures"])
    assert all(seen["labels"])
    assert all(seen["folds"])
    assert len(seen["folds"]) > 5
    assert seen["overflow"] <= 0
    assert seen["cut"] == 0
    # The first screen says what was learned, in what memory and time, and what it gained.
    learned, peak, seconds, held_out, exact = (text for text, _ in seen["cards"])
    assert re.fullmatch(r"[\d.]+ %", learned)
    assert re.fullmatch(r"[\d,]+ MiB", peak)
    assert re.fullmatch(r"[\d,]+ s", seconds)
    assert re.fullmatch(r"[\d.]+ → [\d.]+", held_out)
    assert re.fullmatch(r"\d+ → \d+ %", exact)
    assert width < 500 or all(bottom < 900 for _, bottom in seen["cards"])
    assert all(b - a <= 1 for a, b in itertools.pairwise(seen["levels"]))
    assert min(contrast(*pair) for pair in seen["colours"]) >= 4.5
    text, ground = (sum(map(int, re.findall(r"\d+", x)[:3])) for x in seen["colours"][0])
    assert (text - ground > 400) if scheme == "dark" else (ground - text > 400)
    asked = [
        json.loads(line["message"])["message"]["params"].get("request", {}).get("url", "")
        for line in browser.get_log("performance")
        if "Network.requestWillBeSent" in line["message"]
    ]
    assert {url.partition(":")[0] for url in asked if url} <= {"file", "data"}
    assert not [line for line in browser.get_log("browser") if line["level"] != "INFO"]
