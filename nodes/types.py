"""The pack's own connection types."""

from __future__ import annotations

from comfy_api.latest import io

SubjectType = io.Custom("SUBJECT")
ClassPriorsType = io.Custom("CLASS_PRIORS")
SubjectLoraType = io.Custom("SUBJECT_LORA")
DreamBoothOptionsType = io.Custom("DREAMBOOTH_OPTIONS")

CATEGORY = "SubjectBooth"
