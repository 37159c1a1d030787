"""The subjects of the compression suites at their two sizes: standard, and a quick run that only tests the flow."""

from __future__ import annotations

from .compress_subject import Case

SMOLLM2 = Case("smollm2-135m", window=256, calibration=64, training=400, test=24)
MINILM = Case("minilm-l6", window=256, calibration=768, training=1270, test=480)
LITE0 = Case("efficientnet-lite0", calibration=64, training=256, test=200)

QUICK_SMOLLM2 = Case("smollm2-135m", layers=4, window=64, calibration=2, test=2, lengths=(1, 16, 64), rounds=3)
QUICK_MINILM = Case("minilm-l6", window=64, calibration=4, test=16, lengths=(1, 16, 64), rounds=3)
QUICK_LITE0 = Case("efficientnet-lite0", calibration=2, test=6, rounds=3)
