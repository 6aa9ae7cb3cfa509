"""What `helpers.commands` loads before any command: what generation and training import."""

from __future__ import annotations

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

# ruff: noqa: F401
import diffusers.pipelines.auto_pipeline
import diffusers.pipelines.stable_diffusion
import diffusers.schedulers.scheduling_ddim
import scipy.stats
import transformers.models.auto.image_processing_auto
import transformers.models.clip.modeling_clip
import transformers.models.clip.tokenization_clip

import discl.cli
import discl.pipeline
import discl.report.page
import discl.stages.workers.local
