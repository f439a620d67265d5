"""The report as one HTML page that loads nothing: style and charts are inside it."""

import json
from collections.abc import Mapping
from html import escape
from importlib import resources
from typing import Any

from instruct_jax.evaluation import curves, sections
from instruct_jax.evaluation.markup import duration, label_of, number, percent, style_of, wrap

Report = Mapping[str, Any]

SECTIONS = {
    "Preferences": sections.preferences,
    "Helpful, honest, harmless": sections.criteria,
    "Reward model": sections.reward_model,
    "Reinforcement learning": curves.reinforcement,
    "Alignment tax": sections.alignment_tax,
    "Supervised stages": curves.supervised,
}


def page(report: Report) -> str:
    """The whole page; `report` is of the form in report.py."""
    bodies = {name: section(report) for name, section in SECTIONS.items()}
    bodies |= {
        "Samples": _samples(report),
        "Time": sections.timings(report),
        "Configuration": _configuration(report),
    }
    bodies = {name: body for name, body in bodies.items() if body}
    links = "".join(f'<a href="#{_anchor(name)}">{escape(name)}</a>' for name in bodies)
    main = "".join(
        f'<section><h2 id="{_anchor(name)}">{escape(name)}</h2>{body}</section>'
        for name, body in bodies.items()
    )
    style = resources.files("instruct_jax.evaluation").joinpath("report.css").read_text("utf-8")
    title = escape(report["title"])
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{style}</style></head><body>"
        f"<header><h1>{title}</h1>{_about(report)}<nav>{links}</nav>"
        f"{_cards(report)}{_notes(report)}</header>{main}"
        "<footer>Intervals are 95 % bootstrap intervals over prompts. The same figures are in"
        " report.json beside this page.</footer></body></html>\n"
    )


def _about(report: Report) -> str:
    summary = f"<p>{escape(report['summary'])}</p>" if report.get("summary") else ""
    parts = [f"{name} {value}" for name, value in report.get("environment", {}).items()]
    return summary + (f'<p class="small">{escape(" · ".join(parts))}</p>' if parts else "")


def _notes(report: Report) -> str:
    notes = "".join(f"<li>{escape(note)}</li>" for note in report.get("notes", []))
    return f"<h3>What this shows, and what it does not</h3><ul>{notes}</ul>" if notes else ""


def _cards(report: Report) -> str:
    """The four figures to take away."""
    cards = []
    rates = report.get("win_rate_vs_sft", {})
    if best := next((name for name in ("ppo_ptx", "ppo") if name in rates), None):
        rate = rates[best]
        note = f"{percent(rate['low'], 0)[:-2]}–{percent(rate['high'], 0)}, ties half"
        cards.append((best, percent(rate["mean"], 0), f"{label_of(best)} preferred to SFT", note))
    if reward := report.get("reward_model"):
        notes = [
            f"{text} {percent(reward[key]['mean'], 0)}"
            for key, text in (("length_only", "length only"), ("labelers", "ceiling"))
            if key in reward
        ]
        value = percent(reward["accuracy"]["mean"], 0)
        cards.append(("", value, "reward-model accuracy", ", ".join(notes)))
    losses = report.get("pretrain_loss", {})
    if losses.get("gpt") is not None and losses.get("ppo_ptx") is not None:
        rise = {m: losses[m] - losses["gpt"] for m in ("ppo", "ppo_ptx") if m in losses}
        note = "nats a token" + (f"; PPO {rise['ppo']:+.3f}" if "ppo" in rise else "")
        cards.append(("ppo_ptx", f"{rise['ppo_ptx']:+.3f}", "alignment tax of PPO-ptx", note))
    if seconds := report.get("timings"):
        slowest = max(seconds, key=lambda phase: seconds[phase])
        note = f"{label_of(slowest)} {duration(seconds[slowest])}"
        cards.append(("", duration(sum(seconds.values())), "from data to report", note))
    return wrap(
        "cards",
        "".join(
            f'<div class="card {style_of(name) if name else ""}"><b>{escape(value)}</b>'
            f"<span>{escape(what)}</span><small>{escape(note)}</small></div>"
            for name, value, what, note in cards
        ),
    )


def _samples(report: Report) -> str:
    cards = []
    for sample in report.get("samples", []):
        answers = {k: v for k, v in sample.items() if isinstance(v, Mapping)}
        tags = [str(sample[k]) for k in ("family", "kind", "use_case") if sample.get(k)]
        cards.append(
            f'<div class="sample"><div class="prompt"><span class="tags">'
            f"{escape(' · '.join(dict.fromkeys(tags)))}</span>"
            f"{escape(sample['prompt'].strip())}</div>"
            + wrap("answers", "".join(_answer(k, v, answers) for k, v in answers.items()))
            + "</div>"
        )
    intro = "<p>The first sample of every model for the same prompts.</p>"
    return intro + "".join(cards) if cards else ""


def _answer(name: str, answer: Mapping[str, Any], names: Mapping[str, Any]) -> str:
    grade = f"{number(answer['gold'], 2)} of 7" if answer.get("gold") is not None else ""
    cut = "" if answer.get("ended", True) else ' <span class="cut">[no end]</span>'
    return (
        f'<div class="answer {style_of(name, names)}"><div class="who">'
        f"{escape(label_of(name))}<span>{grade}</span></div>"
        f'<div class="text">{escape(answer["text"].strip())}{cut}</div></div>'
    )


def _configuration(report: Report) -> str:
    if not report.get("config"):
        return ""
    text = escape(json.dumps(report["config"], indent=2, ensure_ascii=False))
    return f"<details><summary>The resolved configuration</summary><pre>{text}</pre></details>"


def _anchor(name: str) -> str:
    return name.lower().replace(",", "").replace(" ", "-")
