"""SubjectBooth: DreamBooth inside ComfyUI, from three to five photos to pictures in one graph."""

try:
    # Outside ComfyUI (a test runner collecting this folder, say) there is nothing to register.
    import comfy_api.latest  # noqa: F401
except ImportError:
    pass
else:
    from .nodes import comfy_entrypoint

    WEB_DIRECTORY = "./js"
    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
