"""The model card, written from the measured numbers so that it cannot go stale."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from string import Template
from typing import Any

__all__ = ["write_card"]

TEXT = Path(__file__).with_name("card.md")


def write_card(target: Path, results: Mapping[str, Any]) -> None:
    """Fill the card's text with `results` (see `evaluate_all`) and write it to `target`."""
    training = results["training"]
    minutes = {name: round(line.get("seconds", 0) / 60) for name, line in training.items()}
    fields = {
        "accuracy": _accuracy(results["accuracy"]),
        "before": _pruning(results["before"]),
        "after_0": _pruning(results["after"]["0"]),
        "after_1": _pruning(results["after"]["1"]),
        "easy": _pruning(results["easy"]),
        "kinds": _kinds(results["kinds"]),
        "margins": _margins(results["margins"]),
        "questions": str(results["questions"]),
        "pruned": str(results["pruned"]),
        "full": f"{results['full']:.3f}",
        "easy_questions": str(results["accuracy"]["easy-vqa"]["n"]),
        "foreground": f"{results['foreground']:.0%}",
        "stages": _rows((name, training[name]["step"], f"{minutes[name]} min") for name in training),
        "total": f"{sum(minutes.values()) - min(minutes['vision'], minutes['language'])} min",  # those two ran together
        "machine": results["machine"],
        "note": results.get("note", ""),
    }
    target.write_text(Template(TEXT.read_text(encoding="utf-8")).substitute(fields), encoding="utf-8")


def _rows(rows: Iterable[Iterable[object]]) -> str:
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def _accuracy(accuracy: Mapping[str, Mapping[str, float]]) -> str:
    names = {"overall": "scenes, all kinds", "easy-vqa": "easy-VQA (test split)"}
    return _rows((names.get(name, name), f"{row['accuracy']:.3f}", row["n"]) for name, row in accuracy.items())


def _pruning(table: Mapping[str, Mapping[str, float]]) -> str:
    budgets = list(next(iter(table.values())))
    head = _rows([["tokens kept", *budgets], ["---"] * (len(budgets) + 1)])
    return head + "\n" + _rows([name, *(f"{row[keep]:.3f}" for keep in budgets)] for name, row in table.items())


def _kinds(table: Mapping[str, Mapping[str, float]]) -> str:
    kinds = list(next(iter(table.values())))
    head = _rows([["22 tokens kept", *kinds], ["---"] * (len(kinds) + 1)])
    return head + "\n" + _rows([name, *(f"{row[kind]:.2f}" for kind in kinds)] for name, row in table.items())


def _margins(margins: Iterable[Mapping[str, Any]]) -> str:
    return _rows(
        (
            row["keep"],
            row["where"],
            f"{row['better']} over {row['worse']}",
            f"{row['margin']:+.3f} ± {row['error']:.3f}",
        )
        for row in margins
    )
