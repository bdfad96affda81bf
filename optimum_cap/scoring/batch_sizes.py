"""The number of tokens, examples and masked streams to compute at a time."""

from collections.abc import Iterable

from transformers import PreTrainedModel

from optimum_cap.data import Batch
from optimum_cap.models import Site, activation_bytes_per_token, device_of, layer_input_width


def tokens_per_chunk(model: PreTrainedModel) -> int:
    """Return the number of tokens to run through a layer at a time.

    More tokens would use memory without saving time. On a CPU, larger tensors even cost time: the
    allocator returns those above 32 MB to the system, and the next one is paged in again.
    """
    if device_of(model).type == "cuda":
        return 65536
    return 2048


def tokens_per_batch(
    model: PreTrainedModel, budget: int, prefix: int = 0, sites: Iterable[Site] = ()
) -> int:
    """Return how many tokens per batch make the recorded intact pass fit half of the budget.

    Args:
        model: The model.
        budget: Bytes.
        prefix: Tokens of the shared prefix, which is computed once for all examples; not included
            in the result.
        sites: The sites whose blocks are recorded in addition to attention.
    """
    config = model.config.get_text_config(decoder=True)
    # Input of the layer, input and output of the attention, and input of its projection.
    per_layer = layer_input_width(model) + 3 * config.hidden_size
    per_token = config.num_hidden_layers * per_layer * 4
    for site in one_site_per_block(sites):
        input_width = site.width if site.output_module == site.projection else config.hidden_size
        per_token += (input_width + config.hidden_size) * 4
    # Each batch recomputes the prefix, so a few large batches are faster.
    most = tokens_per_chunk(model) // (1 if prefix else 4)
    return max(1, min(most, budget // 2 // per_token - prefix))


def streams_per_chunk(model: PreTrainedModel, batch: Batch, budget: int) -> int:
    """Return the number of streams to run at a time so that activations take half of the budget."""
    config = model.config.get_text_config(decoder=True)
    count, longest = batch.input_ids.shape
    tokens = batch.prefix + count * (longest - batch.prefix)
    per_token = activation_bytes_per_token(model, longest)
    # Each example reads the prefix's keys and values, twice under grouped-query attention.
    prefix_reads = count * batch.prefix * 4 * 4 * config.hidden_size
    most = tokens_per_chunk(model) // tokens
    return max(1, min(most, budget // 2 // (tokens * per_token + prefix_reads)))


def one_site_per_block(sites: Iterable[Site]) -> list[Site]:
    """Return one site of each MLP and one of each experts module."""
    return list({site.output_module: site for site in sites if not site.mixes_tokens}.values())
