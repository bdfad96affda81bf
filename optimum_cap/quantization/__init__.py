"""Quantization of pruned checkpoints, in formats that transformers loads through other packages."""

from optimum_cap.quantization.checkpoints import check_calibration, check_new, quantize_checkpoint
from optimum_cap.quantization.coverage import check_reaches
from optimum_cap.quantization.schemes import SCHEMES, Scheme, get_scheme

__all__ = [
    "SCHEMES",
    "Scheme",
    "check_calibration",
    "check_new",
    "check_reaches",
    "get_scheme",
    "quantize_checkpoint",
]
