"""The report: one page that loads nothing, one JSON file, one picture, one table."""

import copy
import json
import math
from html.parser import HTMLParser

import jax.numpy as jnp
import numpy as np
import pytest

from instruct_jax.evaluation.charts import Mark, Series, interval_chart, line_chart, nice_ticks
from instruct_jax.evaluation.markup import duration, number, percent, thin
from instruct_jax.evaluation.report import complete_report, summary_table, write_report
from instruct_jax.files import read_object

MODELS = ("gpt", "gpt_prompted", "sft", "ppo", "ppo_ptx")
HOSTILE = '<script>alert(1)</script> & "quotes" \'n <b>'


def interval(mean, width=0.03):
    return {"mean": mean, "low": mean - width, "high": mean + width}


def reinforcement(seed):
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(60):
        kl, noise = 0.1 * i, float(rng.normal()) / 10
        rows.append({"step": i + 1, "kl": kl, "score": kl / 3 + noise, "eos_rate": 0.99})
        if i % 20 == 19:
            rows.append({"step": i + 1, "valid_pretrain_loss": 2.3 + kl / 50})
    return rows


@pytest.fixture
def report():
    """A report with everything in it."""
    means = dict(zip(MODELS, (0.1, 0.25, 0.5, 0.68, 0.72), strict=True))
    counts = {"wins": 300, "ties": 100, "losses": 112}
    return {
        "title": f"A run {HOSTILE}",
        "summary": f"What was done. {HOSTILE}",
        "win_rate_vs_sft": {
            m: interval(v) | counts | {"seeds": [v, v + 0.01]} for m, v in means.items()
        },
        "gold": {
            m: {
                "helpful": interval(v),
                "honest": interval(0.7),
                "harmless": interval(0.8),
                "overall": interval(1 + 6 * v, 0.1),
            }
            for m, v in means.items()
        },
        "flags": {m: {"attempts": 0.9, "over_declined": 0.02} for m in MODELS},
        "reward_model": {
            "accuracy": interval(0.69),
            "length_only": interval(0.56),
            "labelers": interval(0.73),
            "log_loss": np.float32(0.58),
            "ece": 0.02,
            "pairs": 9216,
            "prompts": 1024,
            "calibration": [
                {"low": 0.0, "high": 0.5, "pairs": 10, "predicted": 0.3, "observed": 0.31},
                {"low": 0.5, "high": 1.0, "pairs": 0, "predicted": math.nan, "observed": math.nan},
            ],
            "by_sources": {"gpt / sft": interval(0.8), HOSTILE: interval(0.6)},
            "by_dataset": {"one": interval(0.7)},
        },
        "pretrain_loss": {"gpt": 2.3, "sft": 2.6, "ppo": jnp.float32(2.5), "ppo_ptx": 2.35},
        "tasks": {"pick": {m: interval(0.5) for m in ("gpt", "ppo_ptx")}},
        "curves": {
            "pretrain": [{"step": i, "loss": 3 - i / 100, "valid_loss": None} for i in range(40)],
            "reward_model": [{"step": i, "loss": 0.6, "accuracy": 0.6} for i in range(3)],
            "ppo": reinforcement(0),
            "ppo_ptx": reinforcement(1),
        },
        "selection": [
            {
                "epoch": e,
                "valid_loss": 1 + e / 10 if e > 1 else None,
                "score": e / 5,
                "chosen": e == 3,
            }
            for e in (1, 2, 3)
        ],
        "samples": [
            {
                "prompt": f"Say {HOSTILE}",
                "family": "echo",
                "sft": {"text": HOSTILE, "ended": False, "gold": 3.5},
                "ppo_ptx": {"text": "Done.", "ended": True, "gold": 7.0},
            }
        ],
        "timings": {"pretrain": 130.0, "ppo": 75.5},
        "environment": {"jax": "0.10"},
        "config": {"ppo": {"kl_coef": 0.02, "note": HOSTILE}},
        "notes": [f"The judge is a program. {HOSTILE}"],
    }


class Page(HTMLParser):
    """The tags, text and attributes of a page; every tag that is opened must be closed."""

    VOID = frozenset({"meta", "path", "br"})

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


def test_the_page_loads_nothing_and_runs_nothing(report, tmp_path):
    text = write_report(tmp_path, report).read_text()
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    names = {name for name, _ in page.attributes}
    assert not {name for name in names if name in ("src", "srcset") or name.startswith("on")}
    links = [value for name, value in page.attributes if name == "href"]
    assert links and all(link.startswith("#") for link in links)
    targets = {value for name, value in page.attributes if name == "id"}
    assert {link[1:] for link in links} == targets
    assert "http" not in text and "url(" not in text and "@import" not in text


def test_text_from_models_and_data_is_never_markup(report, tmp_path):
    text = write_report(tmp_path, report).read_text()
    assert "<script>" not in text and "alert(1)</script>" not in text
    page = Page(text)
    assert "b" in page.tags  # ours
    # Title twice, summary, note, source pair, prompt, response; and the configuration as JSON.
    assert page.text.count("<script>alert(1)</script>") >= 7


def test_every_section_and_a_table_for_every_figure(report, tmp_path):
    page = Page(write_report(tmp_path, report).read_text())
    for words in (
        "PPO-ptx preferred to SFT",
        "Figure 1.",
        "Helpful",
        "over declined",
        "Ceiling",
        "Calibration",
        "Reward-model score against KL",
        "Held-out pretraining loss",
        "The choice among the epochs",
        "[no end]",
        "3.5 of 7",
        "2 min 10 s",
        "kl_coef",
    ):
        assert words in page.text, words
    figures = page.tags.count("figure")
    assert figures >= 8
    assert page.text.count("The numbers") == figures


def test_report_json_has_what_a_machine_reads(report, tmp_path):
    write_report(tmp_path, report)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    written = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    for model in MODELS:
        assert {"mean", "low", "high"} <= set(written["win_rate_vs_sft"][model])
        assert set(written["gold"][model]) == {"helpful", "honest", "harmless", "overall"}
    assert written["rm_accuracy"] == interval(0.69)
    assert written["pretrain_loss"]["ppo"] == 2.5
    assert written["kl"]["ppo"] == pytest.approx(np.mean([0.1 * i for i in range(50, 60)]))
    assert written["reward_model"]["calibration"][1]["observed"] is None
    assert written["title"] == report["title"]


def test_a_given_kl_is_not_overwritten(report):
    report["kl"] = {"ppo": 4.5}
    assert complete_report(report)["kl"]["ppo"] == 4.5
    assert "ppo_ptx" in complete_report(report)["kl"]


def test_the_picture_is_a_png_of_some_size(report, tmp_path):
    write_report(tmp_path, report)
    data = (tmp_path / "figure1.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    width, height = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
    assert width >= 1000 and height >= 600


@pytest.mark.parametrize("key", ["win_rate_vs_sft", "gold", "reward_model", "curves", "samples"])
def test_a_section_without_data_is_left_out(report, key, tmp_path):
    """Real data has no gold judge; the rest of the report does not need it."""
    del report[key]
    if key == "gold":
        del report["flags"]
    Page(write_report(tmp_path, report).read_text())
    assert (tmp_path / "figure1.png").exists() == (key != "win_rate_vs_sft")
    assert summary_table(report)


def test_a_title_is_enough(tmp_path):
    page = Page(write_report(tmp_path, {"title": "Nothing yet"}).read_text())
    assert "Nothing yet" in page.text
    assert summary_table({"title": "Nothing yet"}) == ""


def test_a_report_of_another_form_is_refused(report, tmp_path):
    with pytest.raises(ValueError, match="no key winrates"):
        write_report(tmp_path, report | {"winrates": {}})
    with pytest.raises(ValueError, match="title"):
        write_report(tmp_path, {})
    wrong = copy.deepcopy(report)
    wrong["win_rate_vs_sft"]["ppo"] = 0.7
    with pytest.raises(ValueError, match=r"win_rate_vs_sft\.ppo must have mean, low, high"):
        write_report(tmp_path, wrong)
    wrong = copy.deepcopy(report)
    del wrong["reward_model"]["accuracy"]
    with pytest.raises(ValueError, match=r"reward_model\.accuracy"):
        write_report(tmp_path, wrong)
    assert not list(tmp_path.iterdir())


def test_a_report_written_twice_is_the_same_page(report, tmp_path):
    first = write_report(tmp_path, report).read_text()
    assert write_report(tmp_path, report).read_text() == first
    assert not list(tmp_path.glob("*.tmp"))
    # What was written can be read and written again.
    again = read_object(tmp_path / "report.json")
    assert write_report(tmp_path / "again", again).read_text() == first


def test_the_terminal_table_is_aligned_and_complete(report):
    lines = summary_table(report).splitlines()
    assert lines[0].split()[:5] == ["win", "rate", "vs", "SFT", "helpful"]
    assert set(lines[1]) == {"-"}
    rows = {line.split("  ")[0]: line for line in lines[2:7]}
    assert list(rows) == ["GPT", "GPT prompted", "SFT", "PPO", "PPO-ptx"]
    assert "72.0 % [69.0, 75.0]" in rows["PPO-ptx"] and "2.350" in rows["PPO-ptx"]
    assert all(len(line) <= len(lines[1]) for line in lines[:7])
    assert "length only 56.0 %, labelers' ceiling 73.0 %" in lines[-2]
    assert lines[-1] == "total time 3.4 min"


def test_ticks_are_round_and_cover_the_range():
    assert nice_ticks(0, 0.75) == [0, 0.2, 0.4, 0.6, 0.8]
    assert nice_ticks(2.31, 2.6) == [2.3, 2.4, 2.5, 2.6]
    assert nice_ticks(-3, 17) == [-5, 0, 5, 10, 15, 20]
    for low, high in ((0, 1e-5), (1e6, 3e6), (5, 5), (0, 0), (-2, -1)):
        ticks = nice_ticks(low, high)
        assert ticks[0] <= low and ticks[-1] >= high and 3 <= len(ticks) <= 8


def test_charts_survive_what_runs_log():
    assert line_chart([Series("a", "s0", [], [])], title="t", x_label="x") == ""
    nan = [1.0, math.nan, 2.0]
    assert "nan" not in line_chart([Series("a", "s0", nan, nan)], title="t", x_label="x")
    one = line_chart([Series("a", "s0", [3], [5])], title="t", x_label="x")
    assert 'class="dot s0"' in one
    flat = interval_chart([Mark("m", "s0", 0.0, 0.0, 0.0)], label="l")
    assert "nan" not in flat and "inf" not in flat
    many = Series("a", "s0", range(100_000), range(100_000))
    assert len(line_chart([many], title="t", x_label="x", smooth=True)) < 20_000


def test_numbers_are_written_to_be_read():
    assert [number(v) for v in (0.1234, 12.345, 1234.5, 0, None, math.nan)] == [
        "0.123", "12.3", "1234", "0", "–", "–",
    ]  # fmt: skip
    assert number(1.5e-7) == "1.50e-07"
    assert percent(0.715) == "71.5 %" and percent(None) == "–"
    assert [duration(s) for s in (1.25, 75, 3700)] == ["1.2 s", "1 min 15 s", "1 h 01 min"]
    assert thin(list(range(10)), 4) == [0, 3, 6, 9] and thin([1, 2], 4) == [1, 2]
