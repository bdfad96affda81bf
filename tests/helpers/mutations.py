"""Mutants of saved checkpoints: files with one damage each, and what becomes of them.

In the folder `tests`, `python -m helpers.mutations` prints the counts of a large campaign.
"""

import argparse
import json
import logging
import multiprocessing
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from helpers.checkpoints import pruned, sign
from optimum_cap.checkpoint import convert_checkpoint, inspect_checkpoint
from optimum_cap.checkpoint.digests import RECORD_NAME, record_digest

OURS = "optimum_cap"
OUTCOMES = (
    "refused by us",
    "equal",
    "warned",
    "refused by transformers",
    "DIFFERENT",
    "UNNAMED",
    "not sampled",
)
"""What a reader does with a mutant; those in capitals must not occur.

Loading a dense checkpoint looks at the ends of its tensors only, so a flipped bit in the middle of
a long one is `not sampled`; `convert` and `inspect --verify` find it.
"""

SMALL = {"num_hidden_layers": 2}
CHECKPOINTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "packed": ("llama", {}, {}),
    "dense": ("llama", {"checkpoint_format": "dense"}, {}),
    "dense, long": ("llama", {"checkpoint_format": "dense", "intermediate_size": 200}, {}),
    "sharded": ("llama", {}, {"max_shard_size": "15KB"}),
    "dense sharded": ("llama", {"checkpoint_format": "dense"}, {"max_shard_size": "15KB"}),
    "experts": ("mixtral", {}, {}),
    "coded": ("llama", {"checkpoint_format": "coded"}, {}),
    "coded experts": ("mixtral", {"checkpoint_format": "coded"}, {}),
    "bfloat16": ("llama", {"dtype": torch.bfloat16}, {}),
    "tied": ("llama", {"tie_word_embeddings": True}, {}),
    "2:4": ("llama", {}, {}),
}
"""Name -> architecture, changes of its config, and options of `save_pretrained`."""


def save_checkpoint(name: str, folder: Path) -> None:
    """Save one of `CHECKPOINTS`."""
    architecture, changes, options = CHECKPOINTS[name]
    model = pruned(architecture, **SMALL, **changes)
    if name == "2:4":
        for parameter in model.parameters():
            if parameter.ndim == 2 and parameter.shape[1] % 4 == 0:
                groups = parameter.data.view(-1, 4)
                groups.scatter_(1, groups.abs().argsort(1)[:, :2], 0)
    model.save_pretrained(folder, **options)


# Mutations: each changes one file of a folder, in place


def loaded_file_of(folder: Path, rng: random.Random) -> Path:
    """A file that matters when the checkpoint is loaded: not the model card, nor its picture."""
    files = [path for path in sorted(folder.iterdir()) if path.suffix not in (".md", ".svg")]
    return rng.choice(files)


def weights_of(folder: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(folder.glob("*.safetensors")))


def header_of(file: Path) -> tuple[dict[str, Any], bytes]:
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:start]), data[start:]


def write_header(file: Path, header: Any, rest: bytes) -> None:
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + rest)


def flip_bit(folder: Path, rng: random.Random) -> None:
    """Flip a bit of the values, masks or shapes."""
    file = weights_of(folder, rng)
    data = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[rng.randrange(start, len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def flip_header_bit(folder: Path, rng: random.Random) -> None:
    file = weights_of(folder, rng)
    data = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[rng.randrange(start)] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def change_header(folder: Path, rng: random.Random) -> None:
    """Change a field of a tensor in the header."""
    file = weights_of(folder, rng)
    header, rest = header_of(file)
    name = rng.choice([name for name in header if name != "__metadata__"])
    field = rng.choice(["dtype", "shape", "data_offsets", "entry"])
    if field == "entry":
        header[name] = strange(rng)
    elif field == "dtype":
        header[name]["dtype"] = rng.choice(["F32", "I32", "U8", "F16", "F8_E4M3", "X", None])
    elif header[name][field]:
        position = rng.randrange(len(header[name][field]))
        header[name][field][position] = rng.choice([-1, 0, 7, 1 << 62, 1 << 70, "1", None, 1.5])
    write_header(file, header, rest)


def nest_header(folder: Path, rng: random.Random) -> None:
    file = weights_of(folder, rng)
    depth = rng.choice([100, 2000, 200_000])
    text = b'{"x.weight": ' + b"[" * depth + b"]" * depth + b"}"
    file.write_bytes(len(text).to_bytes(8, "little") + text)


def truncate(folder: Path, rng: random.Random) -> None:
    file = rng.choice(
        [path for path in sorted(folder.iterdir()) if path.suffix not in (".md", ".svg")]
    )
    data = file.read_bytes()
    file.write_bytes(data[: rng.randrange(len(data))])


def append(folder: Path, rng: random.Random) -> None:
    file = weights_of(folder, rng)
    file.write_bytes(file.read_bytes() + rng.randbytes(rng.randrange(1, 9)))


def delete_file(folder: Path, rng: random.Random) -> None:
    rng.choice(
        [path for path in sorted(folder.iterdir()) if path.suffix not in (".md", ".svg")]
    ).unlink()


def swap_tensors(folder: Path, rng: random.Random) -> None:
    """Give two tensors of the same shape each other's values, masks included."""
    file = weights_of(folder, rng)
    tensors = load_file(file)
    names = [name for name in tensors if not name.endswith(("_mask", "_shape"))]
    rng.shuffle(names)
    for first in names:
        for second in names:
            if swappable(tensors, first, second):
                for part in ("", "_mask", "_shape"):
                    if first + part in tensors:
                        tensors[first + part], tensors[second + part] = (
                            tensors[second + part],
                            tensors[first + part],
                        )
                save_file(tensors, file, metadata={"format": "pt"})
                return


def swappable(tensors: dict[str, torch.Tensor], first: str, second: str) -> bool:
    if f"{first}_mask" in tensors and f"{second}_mask" in tensors:
        shapes = tensors[f"{first}_shape"], tensors[f"{second}_shape"]
        return first != second and torch.equal(*shapes)
    alike = tensors[first].shape == tensors[second].shape
    return alike and not torch.equal(tensors[first], tensors[second])


def move_mask_bit(folder: Path, rng: random.Random) -> None:
    """Clear a bit of a mask and set another, so that it keeps as many weights."""
    file = weights_of(folder, rng)
    tensors = load_file(file)
    masks = [name for name in sorted(tensors) if name.endswith("_mask")]
    if not masks:  # of a dense checkpoint
        return
    mask = tensors[rng.choice(masks)]
    bits = [(byte, bit) for byte in range(len(mask)) for bit in range(8)]
    rng.shuffle(bits)
    for wanted in (0, 1):
        byte, bit = next(each for each in bits if int(mask[each[0]]) >> each[1] & 1 == wanted)
        mask[byte] ^= 1 << bit
        bits.remove((byte, bit))
    save_file(tensors, file, metadata={"format": "pt"})


def change_dtype(folder: Path, rng: random.Random) -> None:
    file = weights_of(folder, rng)
    tensors = load_file(file)
    name = rng.choice(sorted(tensors))
    dtypes = [torch.float64, torch.float16, torch.int32, torch.int8]
    tensors[name] = tensors[name].to(rng.choice(dtypes))
    save_file(tensors, file, metadata={"format": "pt"})


def drop_or_rename_tensor(folder: Path, rng: random.Random) -> None:
    file = weights_of(folder, rng)
    tensors = load_file(file)
    name = rng.choice(sorted(tensors))
    value = tensors.pop(name)
    if rng.random() < 0.5:
        tensors[name.replace("0", "7") + rng.choice(["", "x"])] = value
    save_file(tensors, file, metadata={"format": "pt"})


def unpack_one(folder: Path, rng: random.Random) -> None:
    """Replace packed values by two-dimensional ones and leave the mask beside them."""
    file = weights_of(folder, rng)
    tensors = load_file(file)
    packed = [name for name in sorted(tensors) if f"{name}_mask" in tensors]
    if not packed:  # of a dense checkpoint
        return
    name = rng.choice(packed)
    shape = tensors[f"{name}_shape"].tolist()
    tensors[name] = torch.ones(shape, dtype=tensors[name].dtype)
    save_file(tensors, file, metadata={"format": "pt"})


def swap_files(folder: Path, rng: random.Random) -> None:
    files = sorted(folder.glob("*.safetensors"))
    if len(files) < 2:
        swap_tensors(folder, rng)
        return
    first, second = rng.sample(files, 2)
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)


def strange(rng: random.Random) -> Any:
    """Return a JSON value that is probably of the wrong type."""
    return rng.choice(
        [None, True, 0, -1, 1.5, 1e308, 10**30, "", "x\x1b[31m", "\ud800", [], [[]], {}, {"a": 1}]
    )


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def containers(values: Any) -> Iterator[Any]:
    """Yield every object and list in a JSON value that has entries."""
    if isinstance(values, dict | list) and values:
        yield values
        for value in values.values() if isinstance(values, dict) else values:
            yield from containers(value)


def change_json(values: Any, rng: random.Random) -> None:
    """Change, remove or add one value, at a place that is equally likely in each container."""
    container = rng.choice(list(containers(values)))
    keys = list(container) if isinstance(container, dict) else list(range(len(container)))
    key = rng.choice(keys)
    action = rng.choice(["type", "type", "value", "remove", "rename", "nest"])
    if action == "remove":
        del container[key]
    elif action == "rename" and isinstance(container, dict):
        container[f"{key}x"] = container.pop(key)
    elif action == "nest":
        container[key] = nested(rng.choice([3, 70, 600]))
    elif action == "value" and isinstance(container[key], int | float):
        container[key] = rng.choice([container[key] + 1, -container[key], container[key] * 2 + 3])
    elif action == "value" and isinstance(container[key], str):
        container[key] = container[key][::-1] + "x"
    else:
        container[key] = strange(rng)


def json_mutation(pattern: str, signed: bool = False) -> Callable[[Path, random.Random], None]:
    """Return a mutation of a JSON file; if `signed`, the record's digests fit the change."""

    def mutate(folder: Path, rng: random.Random) -> None:
        files = sorted(folder.glob(pattern)) or [folder / RECORD_NAME]
        values = json.loads(files[0].read_text())
        before = json.dumps(values)
        change_json(values, rng)
        if json.dumps(values) == before:
            return
        if signed and files[0].name == RECORD_NAME and isinstance(values.get("files"), dict):
            values["files"]["record_sha256"] = record_digest(values)
        files[0].write_text(json.dumps(values))
        if signed and files[0].name != RECORD_NAME:
            sign(folder)

    return mutate


def garble_text(folder: Path, rng: random.Random) -> None:
    """Put bytes that are not UTF-8, not JSON, or nested too deeply into a JSON file."""
    file = rng.choice(sorted(folder.glob("*.json")))
    data = file.read_bytes()
    position = rng.randrange(len(data))
    garbage = rng.choice(
        [b"\xff", b"\x00", b"}", b'"', b"[" * 100_000, b"9" * 5000, b"\xed\xa0\x80"]
    )
    file.write_bytes(data[:position] + garbage + data[position:])


def signed(mutation: Callable[[Path, random.Random], None]) -> Callable[..., None]:
    """Return a mutation after which the digests fit, so that the content itself is checked."""

    def mutate(folder: Path, rng: random.Random) -> None:
        mutation(folder, rng)
        sign(folder)

    return mutate


MUTATIONS: dict[str, Callable[[Path, random.Random], None]] = {
    "bit of the tensors": flip_bit,
    "bit of the header": flip_header_bit,
    "field of the header": change_header,
    "nested header": nest_header,
    "truncated file": truncate,
    "bytes at the end": append,
    "deleted file": delete_file,
    "swapped tensors": swap_tensors,
    "moved mask bit": move_mask_bit,
    "other dtype": change_dtype,
    "lost or renamed tensor": drop_or_rename_tensor,
    "dense beside a mask": unpack_one,
    "swapped files": swap_files,
    "record": json_mutation(RECORD_NAME),
    "record, new digest": json_mutation(RECORD_NAME, signed=True),
    "config": json_mutation("config.json"),
    "index": json_mutation("*.index.json"),
    "garbled JSON": garble_text,
    "dense beside a mask, new digest": signed(unpack_one),
}
# With new digests, a change of what is valid is no damage: only refusals and crashes count.
CONSISTENT = ("record, new digest", "dense beside a mask, new digest")


# What becomes of a mutant


@contextmanager
def logged_warnings() -> Iterator[list[str]]:
    """Collect the warnings that this package logs."""
    messages: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.name.startswith(OURS):
                messages.append(record.getMessage())

    handler = Collector(logging.WARNING)
    logger = logging.getLogger(OURS)
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)


def is_ours(error: BaseException) -> bool:
    """Whether this package raised the error, not one of the libraries that it calls."""
    last = None
    frame = error.__traceback__
    while frame is not None:
        name = frame.tb_frame.f_globals.get("__name__", "")
        last = name if name.startswith((OURS, "transformers", "safetensors")) else last
        frame = frame.tb_next
    return last is not None and last.startswith(OURS)


def outcome_of(
    read: Callable[[], Any], expected: Any, folder: Path
) -> tuple[str, BaseException | None]:
    """Return one of `OUTCOMES` of reading a mutant, and its error."""
    with logged_warnings() as messages, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            result = read()
        except (ValueError, OSError) as error:
            text = str(error)
            if not is_ours(error):
                return "refused by transformers", error
            # One sentence that names a file, the folder or a tensor.
            is_named = str(folder) in text or ".weight" in text or "pruning config" in text
            is_plain = type(error) in (ValueError, FileNotFoundError, OSError) and "\n" not in text
            return ("refused by us" if is_named and is_plain else "UNNAMED"), error
        except Exception as error:
            return ("UNNAMED" if is_ours(error) else "refused by transformers"), error
    if same(result, expected):
        return "equal", None
    return ("warned" if messages else "DIFFERENT"), None


def same(result: Any, expected: Any) -> bool:
    if isinstance(expected, dict):
        return result.keys() == expected.keys() and all(
            result[name].dtype == expected[name].dtype and torch.equal(result[name], expected[name])
            for name in expected
        )
    return bool(result == expected)


def loaded(folder: Path) -> dict[str, Any]:
    """Return the weights of a model, and its logits, which its config decides."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits = model(torch.arange(4, 12)[None]).logits
    return {**model.state_dict(), "logits": logits}


def converted(folder: Path) -> dict[str, Any]:
    """Return the tensors that conversion to the dense format writes."""
    with tempfile.TemporaryDirectory() as parent:
        target = convert_checkpoint(folder, Path(parent) / "converted", "dense")
        tensors: dict[str, Any] = {}
        for file in sorted(target.glob("*.safetensors")):
            tensors.update(load_file(file))
        return tensors


def verified(folder: Path) -> str:
    inspect_checkpoint(folder, verify=True)
    return "verified"


READERS: dict[str, Callable[[Path], Any]] = {
    "load": loaded,
    "convert": converted,
    "inspect --verify": verified,
}


class Campaign:
    """Mutants of several checkpoints, each read by every reader.

    Args:
        folder: Working folder.
        seed: Of the choice of mutants.
        checkpoints: Names of `CHECKPOINTS`.

    Attributes:
        counts: How often `(mutation, reader, outcome)` occurred.
        faults: Descriptions of the mutants whose outcome must not occur.
    """

    def __init__(self, folder: Path, seed: int, checkpoints: list[str]) -> None:
        self.folder = folder
        self.rng = random.Random(seed)
        self.counts: Counter[tuple[str, str, str]] = Counter()
        self.errors: Counter[str] = Counter()
        self.faults: list[str] = []
        self.expected: dict[tuple[str, str], Any] = {}
        for name in checkpoints:
            save_checkpoint(name, folder / name)
            for reader, read in READERS.items():
                self.expected[name, reader] = read(folder / name)
        self.checkpoints = checkpoints

    def run(self, mutants: int) -> None:
        """Read `mutants` mutants, of all mutations in turn, which take some 40 ms each."""
        names = list(MUTATIONS)
        for number in range(mutants):
            mutation = names[number % len(names)]
            self.try_one(mutation, self.rng.choice(self.checkpoints), number)

    def try_one(self, mutation: str, checkpoint: str, number: int) -> None:
        mutant = self.folder / "mutant"
        shutil.rmtree(mutant, ignore_errors=True)
        shutil.copytree(self.folder / checkpoint, mutant)
        MUTATIONS[mutation](mutant, self.rng)
        if contents(mutant) == contents(self.folder / checkpoint):
            return
        # Loading is the slowest; a third of the mutants is read by each of the others.
        readers = ["load"]
        readers += ["convert"] if number % 3 == 0 else []
        readers += ["inspect --verify"] if number % 3 == 1 else []
        for reader in readers:
            expected = self.expected[checkpoint, reader]
            outcome, error = outcome_of(lambda r=reader: READERS[r](mutant), expected, mutant)
            if outcome == "equal" and reader == "inspect --verify" and mutation not in CONSISTENT:
                outcome = "DIFFERENT"
            is_long = checkpoint == "dense, long" and mutation == "bit of the tensors"
            if outcome == "DIFFERENT" and reader == "load" and is_long:
                outcome = "not sampled"
            self.counts[mutation, reader, outcome] += 1
            if error is not None:
                self.errors[f"{outcome}: {type(error).__name__}"] += 1
            if outcome.isupper():
                described = f"{mutation} of {checkpoint}, {reader}, number {number}: {outcome}"
                self.faults.append(f"{described} {type(error).__name__} {error!s:.300}")

    def add(self, other: "Campaign") -> None:
        """Add the results of another campaign."""
        self.counts += other.counts
        self.errors += other.errors
        self.faults += other.faults

    def table(self) -> str:
        """Return the counts as a Markdown table."""
        lines = [
            f"| mutation | reader | {' | '.join(OUTCOMES)} |",
            "|---|---|" + "---|" * len(OUTCOMES),
        ]
        rows = {(mutation, reader) for mutation, reader, _ in self.counts}
        for mutation in MUTATIONS:
            for reader in READERS:
                if (mutation, reader) in rows:
                    cells = [str(self.counts[mutation, reader, outcome]) for outcome in OUTCOMES]
                    lines.append(f"| {mutation} | {reader} | {' | '.join(cells)} |")
        totals = [
            str(sum(n for (_, _, o), n in self.counts.items() if o == outcome))
            for outcome in OUTCOMES
        ]
        lines.append(f"| all | all | {' | '.join(totals)} |")
        return "\n".join(lines)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run_campaign(seed: int, mutants: int) -> Campaign:
    """Run a campaign over all checkpoints, in one thread and in silence."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        campaign = Campaign(Path(folder), seed, list(CHECKPOINTS))
        campaign.run(mutants)
    campaign.expected.clear()
    return campaign


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mutants", type=int, default=4000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    count, start = arguments.processes, time.monotonic()
    with ProcessPoolExecutor(count, multiprocessing.get_context("spawn")) as pool:
        seeds = [arguments.seed * count + number for number in range(count)]
        campaign, *others = pool.map(run_campaign, seeds, [arguments.mutants // count] * count)
    for other in others:
        campaign.add(other)
    print(campaign.table())
    print(f"\n{arguments.mutants} mutants in {time.monotonic() - start:.0f} s")
    print(", ".join(f"{name} {count}" for name, count in campaign.errors.most_common()))
    for fault in campaign.faults:
        print(fault)
    sys.exit(bool(campaign.faults))


if __name__ == "__main__":
    main()
