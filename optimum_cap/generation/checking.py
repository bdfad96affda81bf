"""Comparison of a model's answers with published ones."""

from optimum_cap.data import Prompt
from optimum_cap.evaluation import TASKS, extract_marked


def is_right(prompt: Prompt, response: str) -> bool | None:
    """Return whether a complete answer has the published result.

    Results of presets are extracted as in evaluation, leniently where the task has a lenient
    extraction. Answers to other data are compared if the published answer has a line `#### RESULT`.

    Args:
        prompt: The prompt, with its published answer.
        response: The text of the answer.

    Returns:
        `None` if there is no published result, or no result in the response.
    """
    expected_results, results = zip(*_results(prompt, response), strict=True)
    expected = expected_results[0]
    if expected is None or not any(result is not None for result in results):
        return None
    return expected in results


def can_be_checked(prompt: Prompt) -> bool:
    """Return whether the published answer to a prompt has a result to compare with."""
    return _results(prompt, "")[0][0] is not None


def _results(prompt: Prompt, response: str) -> list[tuple[str | None, str | None]]:
    """Return the results in the published answer and the response, for each way to extract them."""
    tasks = [task for task in TASKS.values() if task.preset is not None and task.extract]
    of_preset = [task for task in tasks if task.preset == prompt.preset]
    readings = [each for task in of_preset for each in (task.extract, task.fallback) if each]
    published = prompt.published or ""
    return [(read(published), read(response)) for read in readings or [extract_marked]]
