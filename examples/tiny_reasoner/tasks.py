"""Reasoning problems of three kinds, in the spirit of GSM8K, StrategyQA and ARC-Challenge.

`arithmetic` asks for a few steps of arithmetic, `yes_no` compares two memorised facts, and
`multiple_choice` picks one of four animals by a memorised fact. Every answer works first and ends
with a line `#### result`. The facts are the same in all splits; the questions never are, because
the hash of a question decides its split.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ANIMALS = (
    "ant badger bat bear beaver bee bison boar camel cat cobra cow crab crow deer dingo dog "
    "dolphin donkey duck eagle eel elk falcon ferret fox frog goat goose hare hawk heron horse "
    "hyena ibex jackal koala lemur lion lizard llama lynx mole moose mouse newt otter owl ox "
    "panda pig pony puma rabbit rat raven seal shark sheep skunk sloth snail squid stork swan "
    "tiger toad trout turtle viper walrus wasp whale wolf wombat yak zebra"
).split()
PLACES = "cave desert forest lake marsh meadow river tundra".split()
FOODS = "bark fruit grass honey insects leaves meat seeds".split()
NAMES = "Ada Ben Cleo Dan Eva Finn Gus Hana".split()
THINGS = "apples books coins cups keys nuts pens toys".split()
LETTERS = "ABCD"

# Verbs tell the operation; no two steps of a problem share one.
GAINS = "buys finds gets wins".split()
LOSSES = "drops loses sells uses".split()
LARGEST_NUMBER = 60

# Question templates; the words in braces are filled in.
COMPARISONS = (
    "Is the {first} {relation} than the {second}?",
    "Would the {first} be {relation} than the {second}?",
)
CHOICES = {
    "place": ("Which of these lives in the {value}?", "Which one has its home in the {value}?"),
    "food": ("Which of these eats {value}?", "Which one feeds on {value}?"),
}
VERBS = {"weight": "weighs", "speed": "runs"}
RELATIONS = {"weight": ("heavier", "lighter"), "speed": ("faster", "slower")}

# Per cent of the hash range: `train` gets the rest.
_SHARES = {"calibration": 5, "validation": 5, "test": 10}


@dataclass(frozen=True)
class Problem:
    """A question and its worked answer.

    Attributes:
        kind: `"arithmetic"`, `"yes_no"` or `"multiple_choice"`.
        question: The prompt.
        answer: Worked steps, then a line `#### result`.
    """

    kind: str
    question: str
    answer: str

    @property
    def final_answer(self) -> str:
        """The result alone, as `extract_answer` would find it."""
        return self.answer.rpartition("#### ")[2]


@dataclass(frozen=True)
class Fact:
    """What a model has to memorise about an animal."""

    weight: int
    speed: int
    place: str
    food: str


def _facts() -> dict[str, Fact]:
    # A seed of its own: the facts are the same whatever the seed of the problems.
    generator = random.Random(2606)
    weights = generator.sample(range(10, 100), len(ANIMALS))
    speeds = generator.sample(range(10, 100), len(ANIMALS))
    return {
        animal: Fact(weight, speed, generator.choice(PLACES), generator.choice(FOODS))
        for animal, weight, speed in zip(ANIMALS, weights, speeds, strict=True)
    }


FACTS = _facts()


def arithmetic(generator: random.Random) -> Problem:
    """Two or three steps that add or take a one-digit number or double; no result above 60."""
    name, thing = generator.choice(NAMES), generator.choice(THINGS)
    value = generator.randint(3, 40)
    sentences = [f"{name} has {value} {thing}."]
    steps = []
    verbs = {"+": generator.sample(GAINS, 3), "-": generator.sample(LOSSES, 3), "*": ["doubles"]}
    for _ in range(generator.randint(2, 3)):
        amount = generator.randint(2, 9)
        results = {"+": value + amount, "-": value - amount, "*": value * 2}
        operation = generator.choice(
            [
                sign
                for sign, result in results.items()
                if 1 <= result <= LARGEST_NUMBER and verbs[sign]
            ]
        )
        verb, result = verbs[operation].pop(), results[operation]
        if operation == "*":
            amount = 2
            sentences.append(f"{name} {verb} them.")
        else:
            sentences.append(f"{name} {verb} {amount}.")
        steps.append(f"{value}{operation}{amount}={result}")
        value = result
    question = " ".join([*sentences, f"How many {thing} now?"])
    return _problem("arithmetic", question, steps, str(value))


def yes_no(generator: random.Random) -> Problem:
    """Compare the weights or the speeds of two animals, whichever way round is asked."""
    first, second = generator.sample(ANIMALS, 2)
    attribute = generator.choice(("weight", "speed"))
    more, less = RELATIONS[attribute]
    a, b = getattr(FACTS[first], attribute), getattr(FACTS[second], attribute)
    asked = generator.choice((more, less))
    sign, holds = (">", more) if a > b else ("<", less)
    template = generator.choice(COMPARISONS)
    question = template.format(first=first, second=second, relation=asked)
    verb = VERBS[attribute]
    steps = [f"The {first} {verb} {a}", f"The {second} {verb} {b}", f"{a}{sign}{b} {holds}"]
    return _problem("yes_no", question, steps, "yes" if holds == asked else "no")


def multiple_choice(generator: random.Random) -> Problem:
    """Pick the one of four animals that lives in a place or eats a food, recalling all four."""
    attribute = generator.choice(("place", "food"))
    while True:
        options = generator.sample(ANIMALS, 4)
        values = [getattr(FACTS[animal], attribute) for animal in options]
        right = generator.randrange(4)
        if values.count(values[right]) == 1:
            break
    asked = generator.choice(CHOICES[attribute]).format(value=values[right])
    listed = " ".join(
        f"{letter}) {animal}" for letter, animal in zip(LETTERS, options, strict=True)
    )
    verdicts = [LETTERS[place] if place == right else "no" for place in range(4)]
    steps = [
        f"The {animal}: {value} {verdict}"
        for animal, value, verdict in zip(options, values, verdicts, strict=True)
    ]
    return _problem("multiple_choice", f"{asked} {listed}", steps, LETTERS[right])


def _problem(kind: str, question: str, steps: Sequence[str], result: str) -> Problem:
    return Problem(kind, question, "\n".join([*steps, f"#### {result}"]))


Maker = Callable[[random.Random], Problem]

KINDS: dict[str, Maker] = {
    "arithmetic": arithmetic,
    "yes_no": yes_no,
    "multiple_choice": multiple_choice,
}


def split_of(question: str) -> str:
    """Return the split that a question belongs to, from its hash: disjoint by construction."""
    bucket = int.from_bytes(hashlib.sha256(question.encode()).digest()[:4], "big") % 100
    for split, share in _SHARES.items():
        if bucket < share:
            return split
        bucket -= share
    return "train"


def problems(split: str, kind: str, seed: int | str = 0) -> Iterator[Problem]:
    """Yield problems of one split and kind without end; the same seed gives the same ones."""
    generator = random.Random(f"{kind} {seed}")
    while True:
        problem = KINDS[kind](generator)
        if split_of(problem.question) == split:
            yield problem


def make_split(split: str, per_kind: int, seed: int = 0) -> list[Problem]:
    """Return `per_kind` different problems of each kind, kind after kind."""
    chosen: list[Problem] = []
    for kind in KINDS:
        different: dict[str, Problem] = {}
        for problem in problems(split, kind, seed):
            different.setdefault(problem.question, problem)
            if len(different) == per_kind:
                break
        chosen += different.values()
    return chosen


def extract_answer(text: str) -> str | None:
    """Return what follows the first `####` in generated text, or `None` if there is none."""
    _, marker, rest = text.partition("####")
    return rest.strip().split("\n")[0].strip() if marker else None


def write_jsonl(path: Path, rows: Sequence[Problem]) -> None:
    """Write one JSON object a line."""
    path.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows), encoding="utf-8")


def read_jsonl(path: Path) -> list[Problem]:
    """Read what `write_jsonl` wrote."""
    return [Problem(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
