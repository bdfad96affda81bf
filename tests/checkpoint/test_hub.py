"""Upload and download with the genuine Hub client, against a Hub on the loopback interface."""

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from helpers.hub_server import PART_SIZE, LoopbackHub
from helpers.paths import TESTS
from helpers.tiny_models import tiny_model, tiny_tokenizer

OWNER, STRANGER = "hf_owner", "hf_stranger"
CONFIG = (
    "CAPConfig(sparsity={sparsity}, num_samples=6, dataset=["
    "{{'prompt': f'{{n}}+{{n + 1}}=', 'completion': f'{{2 * n + 1}}'}} for n in range(12)])"
)
PUBLISH = f"""
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from optimum_cap import CAPConfig

for sparsity, repo, private in (
    (0.3, "user/tiny-cap", False), (0.6, "user/tiny-cap", False), (0.6, "user/secret", True)
):
    model = AutoModelForCausalLM.from_pretrained(
        "user/dense", pruning_config={CONFIG.format(sparsity="sparsity")}
    )
    model.push_to_hub(repo, private=private)
    AutoTokenizer.from_pretrained("user/dense").push_to_hub(repo)
    torch.save(model.state_dict(), f"{{sparsity}}.pt")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub(tokens={OWNER: "user", STRANGER: "stranger"}) as server:
        yield server


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def run(hub: LoopbackHub, folder: Path) -> Run:
    """Run a command in a fresh process that knows only the loopback Hub, with an empty cache.

    The Hub's address is read when the client is imported, so it cannot be changed in this process.
    """
    count = iter(range(100))

    def run(
        *command: str | Path, token: str | None = OWNER, status: int = 0
    ) -> subprocess.CompletedProcess[str]:
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HF_", "TRANSFORMERS_")) and "proxy" not in name.lower()
        }
        environment = {
            **kept,
            "HF_ENDPOINT": hub.endpoint,
            "HF_HOME": str(folder / f"home-{next(count)}"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            **({"HF_TOKEN": token} if token else {}),
        }
        done = subprocess.run(
            [str(part) for part in command],
            env=environment,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=250,
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done

    return run


@pytest.fixture(scope="module")
def published(hub: LoopbackHub, run: Run, folder: Path) -> LoopbackHub:
    """A Hub with a dense model, two versions of a pruned one, and a private pruned one."""
    tiny_model("llama").save_pretrained(folder / "dense")
    tiny_tokenizer().save_pretrained(folder / "dense")
    run(
        *(sys.executable, "-c"),
        "from huggingface_hub import HfApi\n"
        "HfApi().create_repo('user/dense')\n"
        "HfApi().upload_folder(repo_id='user/dense', folder_path='dense')",
    )
    run(sys.executable, "-c", PUBLISH)
    return hub


def cli(*arguments: str | Path) -> list[str]:
    return [str(Path(sys.executable).with_name("optimum-cli")), "cap", *map(str, arguments)]


@pytest.mark.slow
def test_upload_takes_the_large_file_way(published: LoopbackHub) -> None:
    repository = published.repositories["user/tiny-cap"]
    weights = repository.head.files["model.safetensors"]
    assert weights.lfs
    assert len(weights.content) > PART_SIZE
    parts = [
        request
        for request in published.requests
        if request.method == "PUT" and request.path.startswith(f"/lfs/{weights.sha256}/")
    ]
    assert len(parts) > 1
    assert not repository.private
    assert published.repositories["user/secret"].private


@pytest.mark.slow
def test_model_card_is_ours(published: LoopbackHub) -> None:
    card = published.repositories["user/tiny-cap"].head.files["README.md"].content.decode()
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert metadata["base_model"] == "user/dense"
    assert "automatically generated" not in card


def test_download_is_bit_identical_and_honours_the_revision(
    published: LoopbackHub, run: Run
) -> None:
    commits = published.repositories["user/tiny-cap"].commits
    first = next(commit for commit in commits if "model.safetensors" in commit.files)
    base = published.repositories["user/dense"].head.oid
    run(
        *(sys.executable, "-c"),
        f"""
import torch, optimum_cap
from transformers import AutoModelForCausalLM, AutoTokenizer

for revision, sparsity in (("main", 0.6), ({first.oid!r}, 0.3)):
    model = AutoModelForCausalLM.from_pretrained("user/tiny-cap", revision=revision)
    expected = torch.load(f"{{sparsity}}.pt")
    loaded = model.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    record = model.pruning_record
    assert abs(record.sparsity - sparsity) < 1e-3, record.sparsity
    assert record.base_model == "user/dense"
    assert record.base_revision == {base!r}, record.base_revision
AutoTokenizer.from_pretrained("user/tiny-cap")("1+1=")
""",
        token=None,
    )


@pytest.mark.exhaustive
def test_private_repository_needs_the_right_token(published: LoopbackHub, run: Run) -> None:
    run(
        *(sys.executable, "-c"),
        f"""
import optimum_cap
from transformers import AutoModelForCausalLM

for token in (None, {STRANGER!r}):
    try:
        AutoModelForCausalLM.from_pretrained("user/secret", token=token)
    except OSError as error:
        assert "user/secret" in str(error), error
    else:
        raise AssertionError(f"loaded with token {{token}}")
model = AutoModelForCausalLM.from_pretrained("user/secret", token={OWNER!r})
assert model.pruning_record.base_model == "user/dense"
""",
        token=None,
    )


@pytest.mark.slow
def test_inspect_reads_a_repository(published: LoopbackHub, run: Run) -> None:
    done = run(*cli("inspect", "user/tiny-cap"), token=None)
    assert re.search(r"^base model +user/dense", done.stdout, re.MULTILINE)
    first = next(
        commit
        for commit in published.repositories["user/tiny-cap"].commits
        if "model.safetensors" in commit.files
    )
    done = run(*cli("inspect", "user/tiny-cap", "--json", "--revision", first.oid), token=None)
    assert json.loads(done.stdout)["sparsity"] == pytest.approx(0.3, abs=1e-3)


@pytest.mark.exhaustive
def test_inspect_of_an_unreadable_repository_names_it(published: LoopbackHub, run: Run) -> None:
    for name, token in (("secret", None), ("nothing", OWNER)):
        done = run(*cli("inspect", f"user/{name}"), token=token, status=1)
        assert re.fullmatch(
            rf"optimum-cli cap inspect: error: .*user/{name}.*", done.stderr.strip()
        )
    done = run(*cli("inspect", "user/secret", "--token", OWNER), token=None)
    assert "user/dense" in done.stdout


@pytest.mark.slow
def test_prune_uploads_model_and_tokenizer_in_one_commit(
    published: LoopbackHub, run: Run, folder: Path
) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "diary.txt").write_text("not to be published")
    (folder / "sums.jsonl").write_text(
        "".join(f'{{"prompt": "{n}+{n}=", "completion": "{2 * n}"}}\n' for n in range(8))
    )
    done = run(
        *cli("prune", "-m", "user/dense", "--dataset", "sums.jsonl", "--sparsity", "0.4"),
        *("-o", "out", "--overwrite", "--num-samples", "4"),
        *("--push-to-hub", "user/from-cli", "--private"),
    )
    assert "user/from-cli" in done.stdout
    repository = published.repositories["user/from-cli"]
    assert repository.private
    assert len(repository.commits) == 2, "the initial one and ours"
    on_disk = {
        path.relative_to(folder / "out").as_posix(): path.read_bytes()
        for path in (folder / "out").rglob("*")
        if path.is_file() and path.name != "diary.txt"
    }
    assert {path: blob.content for path, blob in repository.head.files.items()} == on_disk
    assert "tokenizer.json" in on_disk


@pytest.mark.slow
def test_prune_uploads_the_quantized_model_to_a_repository_of_its_own(
    published: LoopbackHub, run: Run, folder: Path
) -> None:
    dense = tiny_model("llama", hidden_size=64, intermediate_size=128, num_attention_heads=4)
    dense.save_pretrained(folder / "wider")
    tiny_tokenizer().save_pretrained(folder / "wider")
    rows = (f'{{"prompt": "{n}+{n}=", "completion": "{2 * n}"}}\n' for n in range(8))
    (folder / "sums.jsonl").write_text("".join(rows))
    done = run(
        *cli("prune", "wider", "--dataset", "sums.jsonl", "--sparsity", "0.4", "-o", "both"),
        *("--recipe", "wanda", "--num-samples", "4", "--device-map", "cpu", "--json"),
        *("--then-quantize", "int4", "--push-to-hub", "user/both"),
    )
    values = json.loads(done.stdout)
    assert values["uploaded"].endswith("user/both")
    assert values["uploaded_quantized"].endswith("user/both-int4")
    for name in ("both", "both-int4"):
        files = published.repositories[f"user/{name}"].head.files
        on_disk = {path.name for path in (folder / name).iterdir()}
        assert set(files) == on_disk
    config = json.loads(files["config.json"].content)
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"


@pytest.mark.slow
def test_prune_refuses_an_upload_that_cannot_work_before_it_loads_the_model(
    published: LoopbackHub, run: Run
) -> None:
    published.requests.clear()
    for token in (None, "hf_expired"):
        done = run(
            *cli("prune", "-m", "user/dense", "--sparsity", "0.4", "-o", "never"),
            *("--push-to-hub", "user/from-cli"),
            token=token,
            status=1,
        )
        assert re.match(r"optimum-cli cap prune: error: .*[Tt]oken", done.stderr.splitlines()[-1])
    assert not [request for request in published.requests if "model.safetensors" in request.path]


@pytest.mark.exhaustive
def test_gated_repository_is_named(published: LoopbackHub, run: Run) -> None:
    repository = published.repositories["user/tiny-cap"]
    repository.gated = True
    try:
        done = run(*cli("inspect", "user/tiny-cap"), token=STRANGER, status=1)
    finally:
        repository.gated = False
    assert "user/tiny-cap" in done.stderr
    assert "gated" in done.stderr


def test_the_test_hub_serves_ranges(published: LoopbackHub) -> None:
    url = f"{published.endpoint}/user/tiny-cap/resolve/main/config.json"
    request = urllib.request.Request(url, headers={"Range": "bytes=0-0"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as answer:
        assert (answer.status, answer.read()) == (206, b"{")
        assert answer.headers["Content-Range"].startswith("bytes 0-0/")
        assert re.fullmatch(r"[0-9a-f]{40}", answer.headers["X-Repo-Commit"])


# Folders that were saved earlier

SAVED = """
import pathlib
from helpers.checkpoints import pruned
from helpers.tiny_models import tiny_tokenizer

pruned().save_pretrained("earlier")
tiny_tokenizer().save_pretrained("earlier")
pathlib.Path("earlier/optimizer.pt").write_bytes(b"state")
pathlib.Path("earlier/.cache").mkdir()
pathlib.Path("earlier/.cache/x").write_text("hidden")
"""


@pytest.fixture
def earlier(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.rmtree(folder / "earlier", ignore_errors=True)
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    run(sys.executable, "-c", SAVED)
    return folder / "earlier"


@pytest.mark.slow
def test_push_uploads_a_whole_folder(published: LoopbackHub, run: Run, earlier: Path) -> None:
    done = run(
        *cli("push", "earlier", "user/pushed", "--base-model", "user/dense", "--private"),
        *("--commit-message", "Ours"),
    )
    assert "uploaded  " in done.stdout
    assert "cap compare DENSE earlier --add-to-card" in done.stdout
    assert "not uploaded, as it is the state of a training: optimizer.pt" in done.stderr
    repository = published.repositories["user/pushed"]
    assert repository.private
    assert repository.head.message == "Ours"
    names = {path.name for path in earlier.iterdir()} - {"optimizer.pt", ".cache"}
    assert set(repository.head.files) == names
    assert {"README.md", "pruning_sparsity.svg", "tokenizer.json"} <= names
    card = yaml.safe_load(repository.head.files["README.md"].content.decode().split("---\n")[1])
    assert card["base_model"] == "user/dense"
    done = run(*cli("inspect", "user/pushed"))
    assert re.search(r"^base model +user/dense", done.stdout, re.MULTILINE)
    run(*cli("report", "user/pushed", "-o", "pushed.html"))
    assert "user/dense" in (earlier.parent / "pushed.html").read_text()
    # Now that the record names it, nobody needs to say it again.
    run(*cli("push", "earlier", "user/pushed"))


@pytest.mark.slow
def test_push_refuses_an_unknown_base_model_before_it_uploads(
    published: LoopbackHub, run: Run, earlier: Path
) -> None:
    published.requests.clear()
    command = cli("push", "earlier", "user/never", "--base-model", "user/nothing")
    done = run(*command, status=2)
    assert "the Hub has no model 'user/nothing' that you may read" in done.stderr
    assert not [request for request in published.requests if request.method in ("POST", "PUT")]
