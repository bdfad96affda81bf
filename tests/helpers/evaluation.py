"""Data files of evaluation tasks, short enough for the tiny models, and models with room."""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from helpers.tiny_models import tiny_model, tiny_tokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SUMS = [{"question": f"{n}+{n}?", "answer": f"{n}+{n}={2 * n}\n#### {2 * n}"} for n in range(12)]
FACTS = [
    {"question": f"is {n} odd?", "answer": n % 2 == 1, "facts": [f"{n} is a number."]}
    for n in range(4)
]
CHOICES = [
    {
        "question": {
            "stem": f"which is {n}?",
            "choices": [{"text": "one", "label": "A"}, {"text": "two", "label": "B"}],
        },
        "answerKey": "AB"[n - 1],
    }
    for n in (1, 2)
]
LINES = [" \n", " = a title = \n", " \n"] + [
    f" line {n} tells what there is to tell about the number {n} , at length . \n"
    for n in range(150)
]


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as JSON lines, with the folder of the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_task_files(folder: Path) -> Path:
    """Write the files of all published data sets that are evaluated."""
    write_rows(folder / "gsm8k" / "test.jsonl", SUMS)
    write_rows(folder / "strategyqa" / "test.jsonl", FACTS)
    write_rows(folder / "arc_challenge" / "ARC-Challenge-Test.jsonl", CHOICES)
    (folder / "wikitext-2").mkdir()
    (folder / "wikitext-2" / "test.txt").write_text("".join(LINES))
    return folder


def with_room(template: str | None = None, size: int = 512) -> tuple[PreTrainedModel, Any]:
    """A tiny model whose context holds instructions and worked examples, with its tokenizer."""
    tokenizer = tiny_tokenizer(template)
    tokenizer.model_max_length = size
    return tiny_model("llama", max_position_embeddings=size), tokenizer
