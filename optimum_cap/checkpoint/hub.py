"""Upload of checkpoints to the Hub."""

from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi

from optimum_cap.checkpoint.folders import is_of_weights


def upload(
    folder: Path,
    repo_id: str,
    names: list[str] | None = None,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    **kwargs: Any,
) -> CommitInfo:
    """Upload a checkpoint in one commit that also removes outdated weight files.

    Args:
        folder: Folder of the checkpoint.
        repo_id: Repository, created if it does not exist.
        names: Paths of the files in `folder` to upload; `None` uploads all of them.
        token: Token for the Hub.
        private: Whether a new repository is private.
        revision: Branch, created if it does not exist.
        commit_message: Message of the commit.
        **kwargs: As for `HfApi.create_commit`.

    Returns:
        Information about the commit.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    if names is None:
        files = (path for path in sorted(folder.rglob("*")) if path.is_file())
        names = [path.relative_to(folder).as_posix() for path in files]
    # An outdated model.safetensors would take precedence over new shards when loading, and outdated
    # results would be those of other weights.
    present = api.list_repo_files(repo_id, revision=revision)
    stale = [
        name
        for name in present
        if "/" not in name and is_of_weights(name) and name not in names  # not files in subfolders
    ]
    return api.create_commit(
        repo_id,
        [
            *(CommitOperationAdd(name, str(folder / name)) for name in names),
            *(CommitOperationDelete(name) for name in stale),
        ],
        commit_message=commit_message or "Upload the pruned model (optimum-cap)",
        revision=revision,
        **kwargs,
    )
