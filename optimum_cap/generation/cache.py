"""Storage of finished answers, from which an interrupted run resumes."""

import os
from pathlib import Path

import torch
from transformers import PreTrainedModel

from optimum_cap.generation.sampling import Answer, Sampling
from optimum_cap.runtime import TensorFiles, digest_of, machine, model_digest

_LAYOUT = 1  # version of files and keys, and of the sampling
_NO_TOKEN = -1


class AnswerStore:
    """Stores the answers of one model with one set of settings.

    Files are named by a digest of everything an answer depends on, except the rest of its batch,
    which affects it only by rounding.

    Args:
        folder: Where to store them; created with the first file. Several runs may share it.
        model: The model. Its weights are hashed here.
        sampling: The settings.

    Attributes:
        files: The files.
    """

    def __init__(
        self, folder: str | os.PathLike[str], model: PreTrainedModel, sampling: Sampling
    ) -> None:
        self.files = TensorFiles(Path(folder))
        self._longest = sampling.max_new_tokens
        self._embeddings = int(model.get_input_embeddings().weight.shape[0])
        settings = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_new_tokens": sampling.max_new_tokens,
            "end_tokens": list(sampling.end_tokens),
        }
        subject = _name(_LAYOUT, machine(model), model_digest(model), settings)
        self._prefix = f"{subject}/answers"

    def get(self, prompt: torch.Tensor, seed: int) -> Answer | None:
        """Return a stored answer, or `None`.

        Args:
            prompt: Tokens of the prompt, int64 `[tokens]`.
            seed: Seed of the answer.
        """
        shape = (2 + self._longest,)
        stored = self.files.read(self._key(prompt, seed), shape, torch.int64, self._problem)
        if stored is None:
            return None
        count, finished, *ids = stored.tolist()
        return Answer(tuple(ids[:count]), bool(finished))

    def put(self, prompt: torch.Tensor, seed: int, answer: Answer) -> None:
        """Store an answer."""
        stored = torch.full((2 + self._longest,), _NO_TOKEN, dtype=torch.int64)
        stored[0], stored[1] = len(answer.ids), int(answer.finished)
        stored[2 : 2 + len(answer.ids)] = torch.tensor(answer.ids, dtype=torch.int64)
        self.files.write(self._key(prompt, seed), stored)

    def _key(self, prompt: torch.Tensor, seed: int) -> str:
        return f"{self._prefix}/{_name(prompt, seed)}"

    def _problem(self, stored: torch.Tensor) -> str | None:
        """Return what is wrong with the values of a stored answer."""
        count, finished, *ids = stored.tolist()
        if not 0 < count <= self._longest or finished not in (0, 1):
            return "its number of tokens or its end is not valid"
        if not all(0 <= token < self._embeddings for token in ids[:count]):
            return "it holds a token that the model has no embedding for"
        return None


def _name(*parts: object) -> str:
    return digest_of(*parts)[:32]
