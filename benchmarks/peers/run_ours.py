"""Prune with optimum-cap, as run_llmcompressor.py does with llm-compressor; called by pruning.py.

Reads `job.json` in a folder (model, data, config, and for the paper's recipe the file with its
losses) and writes `measured.json` there.
"""

import json
import sys
from pathlib import Path

import torch
from measured import measured
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from optimum_cap import CAPConfig, CAPPruner
from optimum_cap.models import find_sites, heads
from optimum_cap.scoring import UnitLosses


def main() -> None:
    folder = Path(sys.argv[1])
    logging.disable_progress_bar()
    job = json.loads((folder / "job.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=getattr(torch, job["dtype"]))
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    losses = None
    if job["scores"]:
        saved = load_file(job["scores"])
        losses = UnitLosses(heads(find_sites(model)), saved["intact"], saved["masked"])
    with measured(folder / "measured.json", job["device"]):
        model.to(job["device"])
        CAPPruner(CAPConfig(**job["config"])).prune(model, tokenizer, losses=losses)


if __name__ == "__main__":
    main()
