"""The nodes, and the extension that registers them with ComfyUI."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io


class SubjectBoothExtension(ComfyExtension):
    """Lists the pack's nodes; ComfyUI calls it once at start-up."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        from .apply import ApplySubjectLoRA
        from .demo_base import LoadDemoBase
        from .estimate import register as register_estimate_route
        from .evaluate import EvaluateSubjectLoRA
        from .gallery_routes import register as register_gallery_routes
        from .options import DreamBoothOptions
        from .priors import GenerateClassPriors
        from .queue_check import register as register_queue_check
        from .routes_pictures import register as register_picture_routes
        from .subject import LoadSubjectImages
        from .train import DreamBoothLoRATrain
        from .train_routes import register as register_train_routes

        register_estimate_route()
        register_gallery_routes()
        register_picture_routes()
        register_train_routes()
        register_queue_check()
        return [
            LoadSubjectImages,
            GenerateClassPriors,
            DreamBoothLoRATrain,
            ApplySubjectLoRA,
            LoadDemoBase,
            DreamBoothOptions,
            EvaluateSubjectLoRA,
        ]


async def comfy_entrypoint() -> SubjectBoothExtension:
    """The entry point that ComfyUI's loader looks for in a V3 pack."""
    return SubjectBoothExtension()
