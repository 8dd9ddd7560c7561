"""One engine per module: starting one takes half a minute."""

from __future__ import annotations

import os

# Before vLLM is imported. The engine in this process lets tests look at its scheduler.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
